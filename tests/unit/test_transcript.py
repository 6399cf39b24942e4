"""What both sides said, as the client's file has it."""

from __future__ import annotations

import json

from personaplex.session.events import UserText, UserTextLost
from personaplex.session.moshi import user_text
from personaplex.transcript import Transcript
from personaplex.words import Segment, Word, segments, spelled


def test_both_sides_are_in_order_of_time() -> None:
    transcript = Transcript()
    for frame, text in [(10, " Hel"), (11, "lo."), (60, " How"), (62, " are you?")]:
        transcript.add_agent(frame, text)
    said = Segment.of([Word("Good", 2.0, 2.3), Word("morning.", 2.3, 2.9)])
    assert transcript.add_notice(user_text(UserText(said))) == said
    transcript.add_notice(user_text(UserTextLost(4.0, 4.5, "behind")))
    transcript.add_notice({"type": "queue", "position": 1})
    data = json.loads(transcript.json({"session": "5e55", "transcription": True}))
    assert (data["session"], data["transcription"]) == ("5e55", True)
    rows = [(one["speaker"], one["text"], one["start_ms"], one["end_ms"]) for one in data["segments"]]
    assert rows == [
        ("agent", "Hello.", 800, 960),
        ("user", "Good morning.", 2000, 2900),
        ("agent", "How are you?", 4800, 5040),
    ]
    assert data["segments"][1]["words"][1] == {"text": "morning.", "start_ms": 2300, "end_ms": 2900}
    assert data["lost"] == [{"start_ms": 4000, "end_ms": 4500, "reason": "behind"}]


def test_what_another_service_sends_is_left_out() -> None:
    transcript = Transcript()
    for data in ({"type": "user_text"}, {"type": "user_text", "text": 1, "words": []}, {}):
        assert transcript.add_notice(data) is None
    assert json.loads(transcript.json({})) == {
        "session": None,
        "transcription": False,
        "segments": [],
        "lost": [],
    }


def test_words_are_cut_where_nothing_is_said() -> None:
    words = spelled([(0, " a"), (1, " b"), (13, " c"), (14, "d\ne")])
    assert [word.text for word in words] == ["a", "b", "cd", "e"]
    assert [segment.text for segment in segments(words)] == ["a b cd e"]
    assert [segment.text for segment in segments(words, pause_s=0.5)] == ["a b", "cd e"]
    assert segments([]) == []
