"""The training room at small size: real gradients, no synthesiser, no judge; each test in a second or two."""

from __future__ import annotations

import dataclasses
import itertools
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from personaplex.config import (
    CODEBOOKS,
    FRAME_SIZE,
    SAMPLE_RATE,
    SILENCE_FRAMES,
    TEXT_PAD,
    LMConfig,
    MimiConfig,
    TransformerConfig,
)
from personaplex.engine.script import compose
from personaplex.training import (
    articulation,
    bank,
    behaviour,
    copying,
    corpus,
    documents,
    export,
    grammar,
    hearing,
    optim,
    reading,
    run,
    score,
    speaking,
    spectra,
    talking,
    unseen,
)
from personaplex.training.articulation import SILENCE, Said
from personaplex.training.documents import AHEAD, LEAD, Batch
from personaplex.training.ear import ASKED, LABELS, QUIET, SPEAKING, Ear, k_means, nearest
from personaplex.training.lm import CODES, CONSTANT, Talker
from personaplex.training.mouth import LATE, Mouth
from personaplex.training.synth import BINS, Speaker, Spoken, Voice, free, locked, periods_of
from personaplex.training.vocabulary import Pieces, train
from personaplex.voices import Voice as EngineVoice
from personaplex.words import word_errors

SMALL = MimiConfig(
    filters=4,
    dim=32,
    transformer=TransformerConfig(dim=32, layers=1, heads=2, hidden=64, context=250),
    codebook_dim=192,
    codebooks=8,
)
pytestmark = pytest.mark.usefixtures("few_words")

SMALL_LM = LMConfig(
    temporal=TransformerConfig(dim=64, layers=2, heads=2, hidden=96, context=500),
    depth=TransformerConfig(dim=32, layers=1, heads=2, hidden=48, context=16),
    text_card=320,
)
DICTIONARY = grammar.dictionary  # which the tests here do without
KNOWN = grammar.Facts("Ada Novak", "Pearl Bakery", "bakery", "gift box", 45, "Monday", "Friday")


@pytest.fixture(scope="module")
def pieces(few_words: None) -> Pieces:
    return Pieces(train())


def vowel(seconds: float = 0.8, f0: float = 140.0) -> Spoken:
    """One steady sound with a formant, as the synthesiser's network would predict it."""
    frames = int(seconds * SAMPLE_RATE / 300)
    envelope = -8 + 6 * np.exp(-(((np.arange(BINS) - 60) / 40) ** 2))
    spectrum = np.repeat(envelope[:, None], frames, 1).astype(np.float32)
    none, pitch = np.full_like(spectrum, -20), np.full(frames, f0, np.float32)
    phones = np.ones(int(seconds * 40), np.uint8)
    return Spoken("ah", spectrum, none * 0, none, none, none * 0, pitch, phones, (("ah", 0.0, seconds),))


def test_held_back_wordings_and_names_are_apart_from_the_trained_ones() -> None:
    for intent in grammar.INTENTS:
        seen, unseen = set(grammar.wordings(intent, False)), set(grammar.wordings(intent, True))
        assert seen
        assert unseen
        assert not seen & unseen
    draw = random.Random(0)
    names = {unseen: {grammar.name(draw, unseen) for _ in range(300)} for unseen in (False, True)}
    assert not names[False] & names[True]


def test_answers_take_their_values_from_the_role_text() -> None:
    text = grammar.role_text(random.Random(3), KNOWN)
    for value in ("Ada Novak", "Pearl Bakery", "gift box", "forty five", "Monday", "Friday"):
        assert value in text
    assert grammar.answer("name", KNOWN) == "My name is Ada Novak, I work for Pearl Bakery."
    assert grammar.answer("price", KNOWN) == "The gift box costs forty five dollars."
    assert [grammar.spoken_number(n) for n in (0, 13, 40, 99, 300, 412)] == [
        *("zero", "thirteen", "forty", "ninety nine", "three hundred"),
        "four hundred twelve",
    ]


def test_a_role_text_that_tells_little_is_answered_by_what_it_tells() -> None:
    named = grammar.Facts("Ada Novak")
    assert grammar.answer("hello", named) == "Hello, this is Ada Novak speaking."
    assert grammar.answer("name", named) == "My name is Ada Novak."
    assert grammar.answer("name", grammar.Facts()) == grammar.answer("price", named) == grammar.UNTOLD
    assert grammar.answer("hello", grammar.Facts()) == "Hello, nice to talk to you."
    for seed in range(400):
        known, text = grammar.world(random.Random(seed))
        values = dataclasses.asdict(known) | {"price": grammar.spoken_number(known.price), "kind": ""}
        assert all(str(value) in text for field, value in values.items() if getattr(known, field)), text
    assert all(grammar.world(random.Random(seed), unseen=True)[0].price for seed in range(50))


def said_locked(voice: Voice) -> tuple[np.ndarray, np.ndarray]:
    """A steady vowel in a voice, and its periods a frame."""
    spoken = vowel()
    laid = articulation.plan(spoken)
    periods = np.full(laid.frames, round(140 * voice.pitch / 12.5))
    return locked(spoken, voice, laid.place, periods), periods


def test_locked_frames_of_a_steady_sound_are_alike() -> None:
    wave, _ = said_locked(Voice(pitch=0.9))
    middle = wave.reshape(-1, FRAME_SIZE)[3:-3]
    for frame in middle[1:]:
        assert np.corrcoef(middle[0], frame)[0, 1] > 0.999


def test_locked_speech_is_a_sum_of_fixed_waves() -> None:
    """Amplitudes between those of two vowels give the wave between theirs: no guess cancels itself."""
    one = vowel()
    change = np.where(np.arange(BINS) < 60, 2.0, -2.0)[:, None].astype(np.float32)
    other = dataclasses.replace(one, harmonic=one.harmonic + change)
    middle = dataclasses.replace(one, harmonic=np.logaddexp(one.harmonic, other.harmonic) - np.log(2))
    laid = articulation.plan(one)
    periods = np.full(laid.frames, 11)
    # The level of each wave is made the same, so that what must agree is the direction.
    waves = [locked(s, Voice(pitch=0.9), laid.place, periods) for s in (one, other, middle)]
    basis = np.stack(waves[:2], 1)
    weights = np.linalg.lstsq(basis, waves[2], rcond=None)[0]
    assert (weights > 0.05).all()
    assert np.square(basis @ weights - waves[2]).sum() < 1e-5 * np.square(waves[2]).sum()
    assert np.corrcoef(waves[0], waves[1])[0, 1] < 0.99


def test_the_mouth_learns_sounds_from_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two phones, one 20 dB fainter than the other: the levels of all bands come near."""
    torch.manual_seed(0)
    monkeypatch.setattr(speaking, "CONFIG", dataclasses.replace(export.CONFIG, mimi=SMALL))
    time = torch.arange(FRAME_SIZE) / SAMPLE_RATE
    tones = torch.stack([0.1 * torch.sin(6.2832 * 500 * time), 0.01 * torch.sin(6.2832 * 4000 * time)])
    draw, rows = random.Random(0), []
    for _ in range(20):
        phones = torch.tensor([draw.randrange(2) for _ in range(30)])
        pcm = (tones[phones] * 32_767).to(torch.int16)
        rows.append(speaking.Frames(phones[:, None].repeat(1, CODEBOOKS), pcm))
    fitted, mouth = speaking.fit(rows), Mouth(SMALL)
    loss = spectra.Loss.of(torch.cat([row.wave.flatten() for row in rows]))
    optimizer = optim.Optimizer(mouth, muon=0.01, adam=5e-3, plain=[mouth.books, mouth.taps])
    before = speaking.quality(mouth, fitted, loss, rows[:3])
    speech = speaking.Speech.of(rows, draw)
    for _ in range(30):
        made = speech.rows(2, draw)
        apart, level = loss(speaking.said(mouth, fitted, made.codes), made.wave.flatten(1))
        optimizer.step(apart + spectra.LEVEL_WEIGHT * level, 1.0)
    after = speaking.quality(mouth, fitted, loss, rows[:3])
    assert after[0] < 0.9 * before[0]
    assert after[1] < 0.6 * before[1]
    assert speaking.render(mouth, fitted, rows[0].codes).shape == (30 * FRAME_SIZE,)


def test_what_is_faint_weighs_as_much_as_what_is_loud() -> None:
    torch.manual_seed(0)
    wanted = torch.randn(1, 24_000) * 0.05
    loss = spectra.Loss.of(wanted[0])
    same = [float(e) for e in loss(wanted, wanted)]
    assert same == [0.0, 0.0]
    apart, level = (float(e) for e in loss(torch.zeros_like(wanted), wanted))
    assert apart > 0.95
    assert level > 5.0
    apart, level = (float(e) for e in loss(2 * wanted, wanted))
    assert abs(level - np.log(4)) < 0.01
    # The same relative error in a sound 20 dB fainter.
    faint = [float(e) for e in loss(0.2 * wanted, 0.1 * wanted)]
    assert abs(faint[0] - apart) < 0.02
    assert abs(faint[1] - level) < 0.1
    phases = torch.fft.rfft(wanted) * torch.polar(torch.ones(12_001), 6.3 * torch.rand(12_001))
    scrambled = torch.fft.irfft(phases)
    apart, level = (float(e) for e in loss(scrambled, wanted))
    assert apart > 0.8
    assert level < 2.0


def test_the_dictionary_to_read_from_holds_nothing_that_is_held_back() -> None:
    """Needs the `train` extra, whose voice brings it."""
    pytest.importorskip("hibari")
    names, words = DICTIONARY()
    assert len(names) > 5_000
    assert len(words) > 40_000
    assert not any(grammar.held_back(word) for word in (*names, *words))


def test_locked_speech_has_the_spectrum_of_the_voice_it_is_made_of() -> None:
    """Needs the `train` extra: the noise of fricatives was once 26 dB too weak beside the harmonics."""
    pytest.importorskip("hibari")
    spoken = Speaker().say("Sorry, she has six fresh fish for Jessica.")
    assert spoken is not None
    laid = articulation.plan(spoken)
    periods = np.full(laid.frames, 16)

    def bands(wave: np.ndarray) -> np.ndarray:
        blocks = wave[: len(wave) // 1200 * 1200].reshape(-1, 1200) * np.hanning(1200)
        power = np.square(np.abs(np.fft.rfft(blocks, axis=1))).mean(0)
        power /= power.sum()
        return np.array([power[a : a + 100].mean() for a in range(0, 600, 100)])

    own = bands(free(spoken, Voice(), np.random.default_rng(0)))
    made = bands(locked(spoken, Voice(), laid.place, periods))
    assert np.abs(10 * np.log10(own / made)).max() < 4


def test_words_begin_at_frames_and_have_room_for_their_pieces() -> None:
    spoken = dataclasses.replace(vowel(1.0), text="one two", words=(("one", 0.1, 0.35), ("two", 0.47, 0.9)))
    laid = articulation.plan(spoken, [1, 9])
    assert laid.starts == (1, 6, 15)
    assert laid.frames == 16
    seconds = laid.place[[1 * 8, 6 * 8, 15 * 8]]
    assert np.allclose(seconds, [0.1, 0.47, 0.94])


def test_codes_say_phones_pitch_and_voice() -> None:
    phones = np.array([[0, 5, 5, 5], [5, 5, 7, 7]])
    words = Said(phones, np.array([3, 9]), np.array([0.0, 190.0], np.float32))
    low, high = (articulation.codes(words, voice) for voice in ("NATM2", "NATF3"))
    for made in (low, high):
        assert np.array_equal(made[:, :4], phones)
        assert made[:, articulation.NEXT].tolist() == [5, 0]
        assert made[:, articulation.LOUDNESS].tolist() == [3, 9]
    assert low[:, articulation.PERIODS].tolist() == [round(190 * 0.5 / 12.5)] * 2
    assert high[:, articulation.PERIODS].tolist() == [round(190 * 1.12 / 12.5)] * 2
    assert low[0, articulation.VOICE] != high[0, articulation.VOICE]


def test_periods_stand_where_nothing_is_voiced() -> None:
    pitch = np.array([[0.0], [125.0], [0.0], [200.0]], np.float32)
    assert periods_of(pitch, 4).tolist() == [10, 10, 10, 16]


def test_k_means_finds_clusters_and_keeps_no_empty_one() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 5, generator=generator) * 10
    x = centres.repeat(40, 1) + 0.1 * torch.randn(320, 5, generator=generator)
    found = k_means(x, 16, generator, rounds=8)
    assert (x - found[nearest(x, found)]).square().sum(1).mean() < 1.0


def test_the_ears_filters_start_as_compressed_band_energies() -> None:
    """A louder tone lowers its own band's channel, over 40 dB, and leaves a far band alone."""
    torch.manual_seed(0)
    ear = Ear(SMALL, 8)
    time = torch.arange(12_000) / SAMPLE_RATE
    levels = []
    for gain in (0.003, 0.03, 0.3):
        with torch.no_grad():
            out = ear.energies(gain * torch.sin(2 * torch.pi * 1000 * time)[None])[0, 96:120, 20:]
        levels.append(out.mean(1))
    band = int(levels[1].argmin())
    assert levels[0][band] > levels[1][band] + 0.5 > levels[2][band] + 1.0
    assert (levels[1][20:] - levels[1][band]).min() > 1.0


def utterance(kind: int, phones: bool = True) -> corpus.Utterance:
    """A tone that stands for the intent with that number."""
    time = np.arange(int(0.4 * SAMPLE_RATE)) / SAMPLE_RATE
    wave = (0.1 * np.sin(2 * np.pi * (400, 1500)[kind] * time)).astype(np.float32)
    labels = np.full(16 if phones else 0, kind + 1, np.uint8)
    return corpus.Utterance(corpus.as_int16(wave), labels, "", LABELS[kind])


def test_the_ear_learns_sounds_from_waves() -> None:
    """Two tones as two phones and two intents: the losses fall."""
    torch.manual_seed(0)
    rng, draw = np.random.default_rng(0), random.Random(0)
    ear, noises = Ear(SMALL, 8), hearing.Noises(rng, seconds=12)
    optimizer = optim.Optimizer(ear, muon=0.004, adam=4e-3)
    utterances = [utterance(0), utterance(1)]
    history = []
    for step in range(15):
        rows = [[utterances[draw.randrange(2)] for _ in range(2)] for _ in range(3)]
        loss, parts = hearing.losses(ear, hearing.batch(rows, noises, utterances, rng, 0.2))
        optimizer.step(loss, min(1.0, (step + 1) / 10))
        history.append(parts)
    assert sum(history[-1][name] for name in ("intent", "turn", "late")) < 0.6 * sum(
        history[0][name] for name in ("intent", "turn", "late")
    )


def test_a_row_tells_turns_and_intents_and_phones_where_they_are_known() -> None:
    rng = np.random.default_rng(0)
    row = [utterance(1), utterance(0, phones=False)]
    data = hearing.batch([row], hearing.Noises(rng, seconds=12), row, rng, 0.0)
    states = data.state[0].tolist()
    told = [s for s in states if s >= 0]
    order = [s for i, s in enumerate(told) if i == 0 or told[i - 1] != s]
    assert order[-4:] in ([SPEAKING, ASKED + 1, SPEAKING, ASKED], [ASKED + 1, QUIET, SPEAKING, ASKED])
    phones = set(data.late[0].tolist())
    assert phones == {0, 2, hearing.UNLABELLED}
    asked = states.index(ASKED + 1)
    spoken = [i for i, s in enumerate(states) if s == SPEAKING and i < asked]
    assert len(spoken) >= 2  # more than half a second of silence is still the caller's turn


def test_phones_that_nobody_knows_count_for_nothing() -> None:
    phones = torch.tensor([[2, 2, 0], [hearing.UNLABELLED] * 3])
    logits = torch.zeros(2, 3, 8)
    logits[1] = torch.randn(3, 8)
    assert torch.isclose(hearing.phone_loss(logits, phones), torch.tensor(8.0).log())
    assert float(hearing.phone_loss(logits[1:], phones[1:])) == 0.0


def test_a_document_is_laid_out_as_the_engine_lays_out_a_session(pieces: Pieces) -> None:
    role_text = grammar.role_text(random.Random(1), KNOWN)
    voice = np.random.default_rng(0).integers(0, CODES, (9, CODEBOOKS))
    document = documents.Document()
    documents.prompt(document, pieces, role_text, sound=True, voice=voice)
    batch = Batch.of([document])
    trained = batch.audio[0]

    role = pieces.prompt(role_text)
    codes = export.to_ids(torch.from_numpy(voice)).t()
    lost = torch.zeros(CODEBOOKS, 1, dtype=torch.int64)  # the engine never reads a voice's first frame
    script = compose(EngineVoice.from_codes(torch.cat([lost, codes], 1)), role, export.CONFIG.lm)
    positions = script.positions
    assert torch.equal(batch.text[0, : len(positions)], positions[:, 0])
    for level in range(CODEBOOKS):
        agent = trained[: len(positions), level]
        start = agent == CODES + 1
        ids = export.to_ids(agent[:, None].expand(-1, CODEBOOKS))[:, level]
        assert torch.equal(torch.where(start, 2048, ids), positions[:, 1 + level])


class Spelled(bank.Words):
    """Words whose sound is made up, so that no synthesiser is needed."""

    def __init__(self, pieces: Pieces) -> None:
        super().__init__(Path("nowhere"), pieces)

    def _say(self, text: str, index: int, least: int) -> Said:
        frames = max(least, 3)
        rng = np.random.default_rng(zlib.crc32(f"{text} {index} {least}".encode()))
        return Said(
            rng.integers(1, 40, (frames, 4)), rng.integers(0, 20, frames), np.full(frames, 190, np.float32)
        )


def test_answers_in_sound_say_their_text_ahead_of_it(pieces: Pieces) -> None:
    words = Spelled(pieces)
    said = words.answer("price", KNOWN)
    document = documents.Document()
    talking._answer(document, random.Random(0), said, "NATF2", "price", stop=False)
    batch = Batch.of([document])
    sound = torch.from_numpy(articulation.codes(articulation.joined([w.sound for w in said]), "NATF2"))
    assert torch.equal(batch.agent[0, LEAD : LEAD + len(sound)], sound)
    assert (batch.agent[0, :LEAD] == SILENCE).all()
    assert (batch.agent[0, LEAD + len(sound) :] == SILENCE).all()
    text = batch.text[0].tolist()
    assert pieces.decode([t for t in text if t != TEXT_PAD]) == "The gift box costs forty five dollars."
    start = free = 0
    for word in said:
        begin = max(free, start + LEAD - AHEAD)
        free = begin + len(word.pieces)
        assert text[begin:free] == word.pieces
        start += len(word.sound)


def test_a_bank_keeps_what_its_words_sound_like(pieces: Pieces, tmp_path: Path) -> None:
    words = Spelled(pieces)
    words._path = tmp_path / "words.npz"
    said = words.answer("name", KNOWN)
    words.save()
    again = bank.Words(tmp_path, pieces)  # speaks nothing: it has no synthesiser here
    for one, other in zip(said, again.answer("name", KNOWN), strict=True):
        assert one.pieces == other.pieces
        assert np.array_equal(one.sound.rows(), other.sound.rows())


class Evenly:
    """A speaker without a network: 0.45 s a word, all of it one phone, the word's number."""

    names = ("", *articulation.ALPHABET)

    def say(self, text: str) -> Spoken:
        count = len(text.split())
        times = tuple((word, 0.45 * i, 0.45 * i + 0.45) for i, word in enumerate(text.split()))
        phones = np.repeat(np.arange(1, count + 1, dtype=np.uint8), 18)
        return dataclasses.replace(vowel(0.45 * count), text=text, words=times, phones=phones)


def test_what_is_read_aloud_is_written_ahead_of_its_sound(
    pieces: Pieces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spelled(folder: Path, pieces: Pieces) -> Spelled:
        words = Spelled(pieces)
        words.speaker = Evenly()  # type: ignore[assignment]
        return words

    monkeypatch.setattr(reading, "Words", spelled)
    monkeypatch.setattr(reading, "words_in_a_row", lambda draw: "Ada Gonzalezqwertz sings.")
    monkeypatch.setattr(reading, "_ANY_WORDS", 1.0)
    monkeypatch.setattr(reading, "_CUT_ANEW", 0.0)
    monkeypatch.setattr(reading, "SHARD", 2)
    reading.make(tmp_path, 1)
    reader = reading.Reader(tmp_path, spelled(tmp_path, pieces))
    (one, other) = reader.sentences
    usual = one.text(pieces, random.Random(0))
    assert usual == other.text(pieces, random.Random(1))
    ids = [pieces.encode(word) for word in ("Ada", "Gonzalezqwertz", "sings.")]
    lengths = [max(6, len(word)) for word in ids]
    assert lengths[1] > 6  # a word has room for its pieces
    assert len(one.said) == sum(lengths)
    begins = np.cumsum([0, *lengths])
    assert one.starts == tuple(begins[:3])
    texts = documents.written(ids, one.starts)
    assert texts[0] == 0
    assert texts[1] < begins[1]
    for number, (word, text, begin) in enumerate(zip(ids, texts, begins, strict=False)):
        assert usual[text : text + len(word)] == word
        assert begin + LEAD - AHEAD <= text <= begin
        assert (one.said.phones[begin + 1 : begin + lengths[number] - 1] == number + 1).all()

    batch = Batch.of([reader.document(random.Random(0))])
    agent, written = batch.agent[0], batch.text[0].tolist()
    assert (batch.weight == 0).all()
    loud = (agent != SILENCE).all(-1).tolist()
    first = 1 + len(reader.words.samples("NATF2")[0]) + SILENCE_FRAMES  # behind start and voice prompt
    starts = [i for i in range(first, len(loud)) if loud[i] and not loud[i - 1]]
    assert len(starts) >= 3
    for start in starts:
        assert written[start - LEAD : start - LEAD + len(usual)] == usual
        assert len(set(agent[start : start + len(one.said), articulation.VOICE].tolist())) == 1
        assert (batch.audible[0, start : start + len(one.said)] == 1).all()
    loss, parts = talking.loss(Talker(SMALL_LM), batch)
    assert torch.isfinite(loss)
    assert parts["text"] == 0


def test_answers_read_aloud_say_what_no_answer_says(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, answer = random.Random(0), "The gift box costs ten dollars."
    mixed = [reading._mixed(answer, draw) for _ in range(50)]
    assert len(set(mixed)) > 40
    assert all(len(text.split()) == 6 and text.endswith(".") for text in mixed)
    monkeypatch.setattr(reading, "_REPLACED", 0.0)
    assert reading._mixed(answer, draw) == answer


def test_words_cut_anew_are_the_same_words_in_pieces_they_have_room_for(pieces: Pieces) -> None:
    draw = random.Random(0)
    for word in ("Stefanie", "Gonzalez", "Adaption."):
        cuts = {tuple(pieces.cut(word, draw, 0.7)) for _ in range(40)}
        assert len(cuts) > 1
        assert {pieces.decode(list(cut)) for cut in cuts} == {word}
        assert pieces.cut(word, draw, 0.0) == pieces.encode(word)
    words, starts = ("Gonzalez", "sings."), (0, 4)
    sound = Said(np.ones((9, 4), np.int64), np.ones(9, np.int64), np.full(9, 190, np.float32))
    sentence = reading.Sentence(words, starts, sound)
    texts = {tuple(sentence.text(pieces, draw)) for _ in range(60)}
    assert len(texts) > 1
    for text in texts:
        assert pieces.decode([t for t in text if t != TEXT_PAD]) == "Gonzalez sings."


def test_the_sound_follows_its_codes_by_a_frame_and_is_handed_out_beside_them() -> None:
    """A frame late, so that the mouth knows what comes."""
    draw, rows = random.Random(0), []
    for number in range(1, 6):
        codes = torch.full((4 + number, CODEBOOKS), number)
        rows.append(speaking.Frames(codes, torch.full((4 + number, FRAME_SIZE), number, dtype=torch.int16)))
    speech = speaking.Speech.of(rows, draw)
    assert torch.equal((speech.all.codes[:, 0] != SILENCE), (speech.all.pcm[:, 0] != 0))
    assert int((speech.all.pcm[:, 0] != 0).sum()) == sum(len(row.codes) for row in rows)
    made = speech.rows(20, draw)
    said = torch.where(made.codes[..., 0] == SILENCE, 0, made.codes[..., 0])
    assert torch.equal(said[:, :-LATE], made.pcm[:, LATE:, 0].long())
    assert said.any()


def test_an_answer_waits_for_a_question_and_ends_when_interrupted(
    pieces: Pieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = Spelled(pieces)
    monkeypatch.setattr(talking, "_INTERRUPTED", 1.0)
    monkeypatch.setattr(talking, "_WAVERS", 0.0)
    monkeypatch.setattr(talking, "_TOO_SOON", 1.0)
    for seed in range(12):
        document = talking.talk(random.Random(seed), words, turns=3)
        batch = Batch.of([document])
        loud = (batch.agent[0] != SILENCE).all(-1).tolist()
        user = batch.user[0, :, 0].tolist()
        told = [
            i for i in range(12, len(user) - 3) if user[i - 1] == SPEAKING and min(user[i : i + 3]) >= ASKED
        ]  # for a frame or two it is nothing
        assert len(told) == 3
        for start in range(12, len(user) - 6):  # behind the voice prompt
            if user[start] == SPEAKING and user[start - 1] != SPEAKING:
                spoken = 6
                while start + spoken < len(user) and user[start + spoken] == SPEAKING:
                    assert not loud[start + spoken], (seed, start)
                    spoken += 1
        for start in told:
            assert any(loud[start : start + 8])


def test_a_pause_falls_where_speech_is_softest() -> None:
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    speech = (np.sin(2 * np.pi * 300 * time) * np.where(np.abs(time - 0.6) < 0.02, 0.01, 0.5)).astype(
        np.float32
    )
    wave = unseen.paused(speech, 0.5)
    assert len(wave) == len(speech) + SAMPLE_RATE // 2
    quiet = np.nonzero(np.abs(wave) == 0)[0]
    assert 0.57 < quiet[quiet > 100][0] / SAMPLE_RATE < 0.63


def test_pitch_is_that_of_the_voice() -> None:
    for factor in (0.6, 0.9, 1.3):
        wave, periods = said_locked(Voice(pitch=factor))
        found = behaviour.pitch(wave)
        assert found is not None
        assert abs(found / (12.5 * periods[3]) - 1) < 0.03


def test_the_talker_looks_at_the_past_only_and_keeps_its_constant(pieces: Pieces) -> None:
    torch.manual_seed(0)
    talker = Talker(SMALL_LM)
    batch = Batch.of([documents.dense(random.Random(0), pieces)])
    optimizer = optim.Optimizer(talker, muon=copying.MUON, adam=copying.ADAM, plain=talker.plain())
    loss, _ = copying.text_loss(talker, batch)
    optimizer.step(loss, 1.0)
    talker.keep_constant()
    for table in (talker.lm.depformer_text_emb, *talker.lm.depformer_emb):
        assert (table.weight[:, 0] == CONSTANT).all()
    audio = torch.randint(CODES, (1, 40, 2 * CODEBOOKS))
    text = torch.randint(4, pieces.size, (1, 40))
    with torch.no_grad():
        before = talker.temporal(text, audio)
        text[0, 25], audio[0, 25, 3] = 5, 6
        after = talker.temporal(text, audio)
    assert torch.allclose(before[0, :25], after[0, :25], atol=1e-5)
    assert not torch.allclose(before[0, 25:], after[0, 25:], atol=1e-3)


def test_activations_computed_again_give_the_same_gradients(pieces: Pieces) -> None:
    batch, gradients = Batch.of([documents.dense(random.Random(0), pieces, turns=2)]), []
    for frugal in (False, True):
        torch.manual_seed(0)
        talker = Talker(SMALL_LM)
        talker.frugal = frugal
        copying.text_loss(talker, batch)[0].backward()
        gradient = talker.lm.transformer.layers[0].self_attn.in_proj_weight.grad
        assert gradient is not None
        gradients.append(gradient)
    assert torch.equal(*gradients)


def test_a_run_that_broke_off_counts_what_was_spent(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    first = run.Run(tmp_path / "r.pt", 5.0, {"module": module}, stage=0)
    first.record({"loss": 3.0})
    first.record({"loss": 1.0})
    first.extra["stage"] = 2
    first.report({"share": np.float64(0.5)})
    again = run.Run(tmp_path / "r.pt", 5.0, {"module": torch.nn.Linear(2, 2)}, stage=0)
    assert (again.step, again.extra["stage"]) == (2, 2)
    assert again.now >= first.history[0]["minutes"] > 0
    assert again.history[0]["loss"] == 2.0
    restored = again.parts["module"].state_dict()["weight"]
    assert torch.equal(restored, module.state_dict()["weight"])


def test_curves_show_the_runs_that_have_reported(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = [tmp_path / "one.pt", tmp_path / "none.pt"]
    run.curves(paths, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
    reported = run.Run(paths[0], 5.0, {})
    reported.record({"loss": 1.0})
    reported.report({"share": 0.5})
    run.curves(paths, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_course_has_every_kind_of_document_and_is_the_same_again(pieces: Pieces) -> None:
    class Aloud:
        def document(self, draw: random.Random) -> documents.Document:
            return documents.repetition(draw, pieces)

    drawn = []
    for _ in range(2):
        course = talking.Course(Spelled(pieces), Aloud(), times=2, seed=3)  # type: ignore[arg-type]
        drawn.append(list(itertools.islice(course, 24)))
    assert {kind for kind, _ in drawn[0]} >= {"talk", "reading", "dense"}
    for (kind, one), (other_kind, other) in zip(*drawn, strict=True):
        assert kind == other_kind
        assert torch.equal(one.text, other.text)
        assert len(one.text) == 2 * (talking._READ if kind == "reading" else 6)


def test_the_talker_learns_one_dialogue_by_heart(pieces: Pieces) -> None:
    torch.manual_seed(0)
    talker = Talker(SMALL_LM)
    optimizer = optim.Optimizer(talker, muon=copying.MUON, adam=copying.ADAM, plain=talker.plain())
    batch = Batch.of([talking.talk(random.Random(0), Spelled(pieces), turns=1)])
    history = []
    for _ in range(40):
        loss, parts = talking.loss(talker, batch)
        optimizer.step(loss, 1.0)
        talker.keep_constant()
        history.append(parts)
    assert history[-1]["text"] < 0.2 * history[0]["text"]
    assert history[-1]["phones"] < 0.7 * history[0]["phones"]


def test_matrices_of_one_shape_are_stepped_as_if_each_were_alone() -> None:
    torch.manual_seed(0)
    shapes = [(6, 4), (6, 4), (12, 4), (4, 6), (6, 2, 2)]
    start = [torch.randn(shape) for shape in shapes]
    gradients = [torch.randn(shape) for shape in shapes]

    def stepped(chosen: list[int]) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(start[i].clone()) for i in chosen]
        params[chosen.index(2)].stacked = 2  # type: ignore[attr-defined]
        optimizer = optim.Muon(params, 0.1)
        for param, i in zip(params, chosen, strict=True):
            param.grad = gradients[i]
        optimizer.step()
        return [param.detach() for param in params]

    together = stepped([0, 1, 2, 3, 4])
    for i in (0, 1, 3, 4):
        alone, other = stepped([i, 2])
        assert torch.allclose(alone, together[i], atol=1e-6)
        assert torch.allclose(other, together[2], atol=1e-6)
    halves = optim.orthogonal(gradients[2].view(2, 6, 4))  # each of both parts is orthogonal
    assert torch.allclose(halves[1:], optim.orthogonal(gradients[2].view(2, 6, 4)[1:]), atol=1e-6)


def test_an_optimiser_goes_on_from_its_checkpoint_as_if_never_stopped(tmp_path: Path) -> None:
    def trained(stop: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ELU(), torch.nn.Linear(8, 3))
        optimizer = optim.Optimizer(module, muon=0.02, adam=1e-2)
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
        for step in range(8):
            if step == stop:
                run.save(tmp_path / "c.pt", {"m": module.state_dict(), "o": optimizer.state_dict()})
                module = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ELU(), torch.nn.Linear(8, 3))
                optimizer = optim.Optimizer(module, muon=0.02, adam=1e-2)
                state = run.load(tmp_path / "c.pt")
                assert state is not None
                module.load_state_dict(state["m"])
                optimizer.load_state_dict(state["o"])
            optimizer.step(module(x).square().mean(), 1.0)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    assert torch.equal(trained(None), trained(4))
    assert run.load(tmp_path / "none.pt") is None


def test_muon_steps_are_orthogonal_matrix_by_matrix() -> None:
    matrices = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(0))
    sizes = torch.linalg.svdvals(optim.orthogonal(matrices, iterations=6))
    assert sizes.min() > 0.5
    assert sizes.max() < 1.4


def test_a_shard_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    written = [
        corpus.Utterance(
            rng.integers(-9, 9, n).astype(np.int16),
            rng.integers(0, 9, n // 5).astype(np.uint8),
            *(t, i),
        )
        for n, t, i in ((50, "hello there", "hello"), (35, "", corpus.OTHER))
    ]
    corpus.save(tmp_path / "callers-0000.npz", written)
    for read, wrote in zip(corpus.load(tmp_path / "callers-0000.npz"), written, strict=True):
        assert (read.text, read.intent) == (wrote.text, wrote.intent)
        assert np.array_equal(read.wave, wrote.wave)
        assert np.array_equal(read.labels, wrote.labels)
    assert [p.name for p in tmp_path.iterdir()] == ["callers-0000.npz"]


def test_a_line_adds_noise_and_no_delay() -> None:
    rng = np.random.default_rng(0)
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    wave = (0.1 * np.sin(2 * np.pi * 300 * time) * np.sin(2 * np.pi * 3 * time) ** 2).astype(np.float32)
    clean = unseen.through_line(wave, 60, rng)
    noisy = unseen.through_line(wave, 10, rng)
    assert len(clean) == len(wave)
    middle = slice(2000, -2000)
    assert np.corrcoef(clean[middle], wave[middle])[0, 1] > 0.98
    ratio = 10 * np.log10(np.mean(wave**2) / np.mean((noisy - clean)[middle] ** 2))
    assert 8 < ratio < 13


def test_scores_count_words_and_give_wilsons_interval() -> None:
    assert score.words("It costs $45, Ada.") == ["it", "costs", "forty", "five", "ada"]
    assert word_errors(["my", "name", "is", "ada"], ["my", "name", "was", "ada", "now"]) == 2
    low, high = score.interval(9, 10)
    assert (round(low, 3), round(high, 3)) == (0.596, 0.982)
    assert score.interval(0, 0) == (0.0, 1.0)
