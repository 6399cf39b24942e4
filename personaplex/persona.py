"""Who the agent is: a voice, a role text and the way its tokens are drawn. Knows no tensors and no files.

A `Persona` is fixed when a session opens and never changes. `PROMPTS` holds role texts the model was trained
or shown with, exactly as published; `VOICES` the names of the 18 voices of the released weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from personaplex.config import Sampling
from personaplex.errors import UnknownVoice

VOICES: tuple[str, ...] = (
    *(f"NAT{gender}{i}" for gender in "FM" for i in range(4)),  # natural, female and male
    *(f"VAR{gender}{i}" for gender in "FM" for i in range(5)),  # varied characters
)
DEFAULT_VOICE = "NATF2"

_OWN = "own:"
_OWN_NAME = re.compile(r"own:[0-9a-f]{64}")
_VOICE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Prompt:
    """One role text of the library; `voices` are the ones it sounds best with, best first."""

    id: str
    label: str
    text: str
    voices: tuple[str, ...]


def _library(*prompts: Prompt) -> Mapping[str, Prompt]:
    return MappingProxyType({prompt.id: prompt for prompt in prompts})


PROMPTS: Mapping[str, Prompt] = _library(
    Prompt(
        "assistant",
        "Assistant (default)",
        "You are a wise and friendly teacher. Answer questions or provide advice in a clear and engaging "
        "way.",
        ("NATF2", "NATM2"),
    ),
    Prompt(
        "medical",
        "Medical office",
        "You work for Dr. Jones's medical office, and you are receiving calls to record information for new"
        " patients. Information: Record full name, date of birth, any medication allergies, tobacco smoking"
        " history, alcohol consumption history, and any prior medical conditions. Assure the patient that "
        "this information will be confidential, if they ask.",
        ("NATF1",),
    ),
    Prompt(
        "bank",
        "First Neuron Bank",
        "You work for First Neuron Bank which is a bank and your name is Alexis Kim. Information: The "
        "customer's transaction for $1,200 at Home Depot was declined. Verify customer identity. The "
        "transaction was flagged due to unusual location (transaction attempted in Miami, FL; customer "
        "normally transacts in Seattle, WA).",
        ("NATF1",),
    ),
    Prompt(
        "astronaut",
        "Astronaut (fun)",
        "You enjoy having a good conversation. Have a technical discussion about fixing a reactor core on a"
        " spaceship to Mars. You are an astronaut on a Mars mission. Your name is Alex. You are already "
        "dealing with a reactor core meltdown on a Mars mission. Several ship systems are failing, and "
        "continued instability will lead to catastrophic failure. You explain what is happening and you "
        "urgently ask for help thinking through how to stabilize the reactor.",
        ("VARF2", "NATF2"),
    ),
    Prompt(
        "service-waste",
        "CitySan Services",
        "You work for CitySan Services which is a waste management and your name is Ayelen Lucero. "
        "Information: Verify customer name Omar Torres. Current schedule: every other week. Upcoming "
        "pickup: April 12th. Compost bin service available for $8/month add-on.",
        ("NATF1",),
    ),
    Prompt(
        "service-restaurant",
        "Jerusalem Shakshuka",
        "You work for Jerusalem Shakshuka which is a restaurant and your name is Owen Foster. Information: "
        "There are two shakshuka options: Classic (poached eggs, $9.50) and Spicy (scrambled eggs with "
        "jalapenos, $10.25). Sides include warm pita ($2.50) and Israeli salad ($3). No combo offers. "
        "Available for drive-through until 9 PM.",
        ("NATM1",),
    ),
    Prompt(
        "service-drone",
        "AeroRentals Pro",
        "You work for AeroRentals Pro which is a drone rental company and your name is Tomaz Novak. "
        "Information: AeroRentals Pro has the following availability: PhoenixDrone X ($65/4 hours, $110/8 "
        "hours), and the premium SpectraDrone 9 ($95/4 hours, $160/8 hours). Deposit required: $150 for "
        "standard models, $300 for premium.",
        ("NATM1",),
    ),
    Prompt(
        "service-repair",
        "SwiftPlex Appliances",
        "You work for SwiftPlex Appliances which is a appliance repair company and your name is Farhod "
        "Toshmatov. Information: The dishwasher model is out of stock for replacement parts; we can use an "
        "alternative part with a 3-day delay. Labor cost remains $60 per hour.",
        ("NATM1",),
    ),
    Prompt(
        "service-italian",
        "Roma Italiano",
        "You work for Roma Italiano which is an Italian restaurant and your name is Marco. Our specialities"
        " are: Margherita pizza ($14), Spaghetti Carbonara ($16), Tiramisu ($8). We offer outdoor seating "
        "and takeout. Open Tue-Sun 11am-10pm.",
        ("NATM0",),
    ),
    Prompt("casual", "Casual chat", "You enjoy having a good conversation.", ("NATF3", "NATM3")),
    Prompt(
        "casual-topic",
        "Eating at home",
        "You enjoy having a good conversation. Have a casual discussion about eating at home versus dining "
        "out.",
        ("NATF3",),
    ),
    Prompt(
        "casual-family",
        "Family amid uncertainty",
        "You enjoy having a good conversation. Have an empathetic discussion about the meaning of family "
        "amid uncertainty.",
        ("NATF3",),
    ),
    Prompt(
        "casual-career",
        "Career and home",
        "You enjoy having a good conversation. Have a reflective conversation about career changes and "
        "feeling of home. You have lived in California for 21 years and consider San Francisco your home. "
        "You work as a teacher and have traveled a lot. You dislike meetings.",
        ("NATM3",),
    ),
    Prompt(
        "casual-food",
        "Favourite foods",
        "You enjoy having a good conversation. Have a casual conversation about favorite foods and cooking "
        "experiences. You are David Green, a former baker now living in Boston. You enjoy cooking diverse "
        "international dishes and appreciate many ethnic restaurants.",
        ("NATM3",),
    ),
)

# Role texts in the form that the embedded `talk` model knows best: it tells their names, prices and days.
TALK_PROMPTS: Mapping[str, Prompt] = _library(
    Prompt(
        "talk-hotel",
        "Green Hotel",
        "You work for Green Hotel which is a hotel and your name is Anna. Information: The single room costs "
        "eighty dollars. Open from Monday to Sunday.",
        ("NATF2", "NATM1"),
    ),
    Prompt(
        "talk-waste",
        "City Services",
        "You work for City Services which is a waste management and your name is Martin. Information: The "
        "compost bin costs eight dollars. Open from Monday to Friday.",
        ("NATM1", "NATF1"),
    ),
    Prompt(
        "talk-pizza",
        "Olive Pizza",
        "You work for Olive Pizza which is a pizza place and your name is Maria. Information: The large "
        "pizza costs fourteen dollars. Open from Tuesday to Sunday.",
        ("NATF0", "NATM0"),
    ),
    Prompt(
        "talk-drone",
        "Sky Rentals",
        "You work for Sky Rentals which is a drone rental company and your name is Thomas. Information: The "
        "drone costs sixty five dollars. Open from Wednesday to Saturday.",
        ("NATM2", "NATF3"),
    ),
    Prompt(
        "talk-lessons",
        "Bright Books",
        "You work for Bright Books which is a book shop and your name is Linda. Information: The first "
        "lesson costs twenty dollars. Open from Monday to Thursday.",
        ("NATF1", "NATM3"),
    ),
)


@dataclass(frozen=True)
class Persona:
    """Voice, role and sampling of one session. An empty `text_prompt` leaves the role to the model.

    `own` is the voice itself, packed (`voices.Voice.pack`), of a session that brings one; `voice` is then its
    name, `own_voice` of its digest.
    """

    voice: str = DEFAULT_VOICE
    text_prompt: str = PROMPTS["assistant"].text
    sampling: Sampling = Sampling()
    own: bytes = field(default=b"", repr=False)


def own_voice(digest: str) -> str:
    """The name of a voice that a session brings itself, by the digest of its content."""
    return f"{_OWN}{digest}"


def own_digest(name: str) -> str:
    """The digest in a name that `own_voice` made; "" for the name of a voice of the library."""
    return name.removeprefix(_OWN) if name.startswith(_OWN) else ""


def voice_name(name: str) -> str:
    """The library name behind what a client wrote: `NATF2` and `NATF2.pt` are the same voice.

    A session's own voice is named `own:DIGEST`, and that is its name. Raises UnknownVoice for anything else
    that is not letters, digits, `_` and `-` (at most 64): a client names a voice and can never name a path.
    """
    if name.startswith(_OWN):
        if not _OWN_NAME.fullmatch(name):
            raise UnknownVoice("an own voice is named as its upload was answered: own:DIGEST")
        return name
    bare = name.removesuffix(".pt")
    if not _VOICE_NAME.fullmatch(bare):
        raise UnknownVoice("a voice is named by letters, digits, '_' and '-', at most 64 of them")
    return bare
