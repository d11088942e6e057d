"""The text of the tiny preset: a grammar of two-party conversations between a user and an assistant.

What the grammar is built to show:

- Half of the user's sentences do not tell their emotion in words, so that text alone names at most
  1/2 + 1/2 * 1/7 = 0.57 of the emotions, and the face and the voice are needed.
- The assistant's reply follows the emotion of the sentence that it answers, and speaks of its content.
- Facts told early (a name, a city, a pet, a job, an age, who did what) are asked for later: `recall` lists the words
  that a reply can know from the history only.
- Splits are held out by content: every utterance that says something has a pair of content words, and a pair belongs to
  exactly one split (by its hash). Short phrases without a pair ("who am i again?") occur in every split; measure
  rebuilding on `unseen_utterances` only.
"""

import hashlib
import random
import re

from empathic.configuration_empathic import EMOTIONS

USER, ASSISTANT = "user", "assistant"  # the names that `ChatSession` gives them too
SPLITS = ("train", "validation", "test")
# Upper bounds, in per cent, of the hash values of `train` and `validation`; `test` has the rest.
SPLIT_BOUNDS = (80, 88)

NAMES = (
    "clara peter nina oscar julia marco emma david laura simon alice victor maria felix helen jonas irene bruno sofia "
    "anton greta leon vera hugo"
).split()
CITIES = (
    "rome paris berlin oslo madrid lisbon vienna prague athens dublin london tokyo cairo boston geneva krakow"
).split()
PETS = (
    "rex luna bella max simba coco rocky daisy milo oreo ginger shadow pepper biscuit mocha tiger pixie buddy hazel "
    "nemo"
).split()
ANIMALS = "dog cat rabbit parrot horse hamster turtle goat".split()
COLOURS = "red blue green grey black white brown golden".split()
ADJECTIVES = [*"old new small big cheap heavy round wooden".split(), *COLOURS]
PERSONS = (
    "mother father sister brother aunt uncle cousin boss neighbour teacher friend wife husband grandma daughter doctor"
).split()
JOBS = "baker nurse pilot lawyer farmer plumber tailor waiter driver singer writer painter".split()
NUMBERS = (
    "two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty ninety"
).split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()

# Every verb's past tense is its participle too, so that it fits active and passive sentences.
TOPICS = {
    "travel": (
        "booked missed changed paid".split(),
        "ticket train hotel flight tour boat cabin ferry bus trip".split(),
    ),
    "cooking": (
        "cooked burned tasted served".split(),
        "soup cake pasta stew bread curry salad pizza fish pie".split(),
    ),
    "work": (
        "signed sent printed filed".split(),
        "report letter contract budget invoice memo email plan survey offer".split(),
    ),
    "exam": (
        "finished repeated graded corrected".split(),
        "exam essay quiz test course lecture thesis homework project lesson".split(),
    ),
    "concert": (
        "played heard recorded copied".split(),
        "song violin piano album guitar trumpet drum opera ballad flute".split(),
    ),
    "garden": (
        "planted watered moved cut".split(),
        "rose tree hedge lawn tulip fern cactus orchid bush vine".split(),
    ),
    "home": (
        "painted cleaned opened fixed".split(),
        "door roof kitchen lamp window table sofa fence cellar attic".split(),
    ),
    "shopping": (
        "bought sold returned found".split(),
        "coat watch ring phone camera bicycle dress clock mirror scarf".split(),
    ),
}

CONTENT_WORDS = frozenset(
    [*NAMES, *CITIES, *PETS, *ANIMALS, *ADJECTIVES, *PERSONS, *JOBS, *NUMBERS, *DAYS]
    + [word for verbs, objects in TOPICS.values() for word in (*verbs, *objects)]
)

# Clauses of the user, by kind. The first one of a kind is also the short one that goes with an emotion phrase.
CLAUSES = {
    "event": (
        "my {person} {verb} the {object}",
        "my {person} {verb} the {adjective} {object} on {day}",
        "on {day} my {person} {verb} the {object} in {city}",
        "the {adjective} {object} was {verb} by my {person}",
        "my {person} {verb} the {object} in {city}",
    ),
    "name": ("my name is {name} and i live in {city}", "i am {name} from {city}", "call me {name}, i live in {city}"),
    "pet": (
        "i have a {animal} called {pet}",
        "i have a {colour} {animal} called {pet}",
        "my {animal} {pet} is {number} years old",
    ),
    "job": ("i work as a {job} in {city}", "i became a {job} in {city}"),
    "age": ("my {person} is {number} years old", "my {person} turned {number} on {day}"),
}
# Sentences whose answer lies in the history: (kind of the fact, sentence, the slot that has to be recalled).
RECALLS = {
    "name": (
        ("do you still know my name?", "name"),
        ("who am i again?", "name"),
        ("do you remember where i live?", "city"),
        ("which city is my home?", "city"),
    ),
    "pet": (
        ("do you remember my {animal}?", "pet"),
        ("what is my {animal} called?", "pet"),
        ("my {animal} ran to my {other} on {day}.", "pet"),
        ("my {other} saw my {animal} in {place}.", "pet"),
    ),
    "job": (("what is my work again?", "job"), ("do you know what i do?", "job")),
    "age": (("how old is my {person} again?", "number"), ("do you know the age of my {person}?", "number")),
    "event": (
        ("who {verb} the {object} again?", "person"),
        ("do you remember who {verb} the {object}?", "person"),
        ("what did i say about my {person}?", "object"),
    ),
}

# What the user says when the words reveal the emotion.
REVEALING = {
    "angry": ("i am furious", "it makes me mad", "i could scream", "how dare they"),
    "disgust": ("it was revolting", "i feel sick", "it smelled awful", "so disgusting"),
    "fearful": ("i am scared", "i am trembling", "it frightens me", "i feel afraid"),
    "happy": ("i am delighted", "i feel great", "i am smiling", "what a joy"),
    "neutral": ("nothing special", "as usual", "just so you know", "by the way"),
    "sad": ("i am heartbroken", "i feel lonely", "i keep crying", "i am in tears"),
    "surprise": ("i am amazed", "i am stunned", "out of nowhere", "can you imagine"),
}
# How the assistant begins a reply to each emotion, and how it goes on about an event.
OPENERS = {
    "angry": ("that is so unfair!", "anyone would be angry!", "what an insult!", "that is outrageous!"),
    "disgust": ("yuck, how nasty!", "that is gross!", "how vile!", "that turns my stomach!"),
    "fearful": ("do not worry.", "you are safe here.", "take a deep breath.", "i will stay with you."),
    "happy": ("that is wonderful!", "how lovely!", "hooray for you!", "what good news!"),
    "neutral": ("i see.", "all right.", "thanks for telling me.", "understood."),
    "sad": ("i am so sorry.", "that must hurt.", "my heart aches.", "sending you a hug."),
    "surprise": ("wow, really?", "no way!", "i did not expect that!", "what a twist!"),
}
EVENT_TAILS = {
    "angry": ("your {person} owes you for the {object}.", "tell your {person} to respect the {object}."),
    "disgust": ("keep away from your {person} and the {object}.", "your {person} should wash the {object}."),
    "fearful": ("your {person} will guard the {object}.", "the {object} and your {person} are fine."),
    "happy": ("enjoy the {object} with your {person}!", "let us cheer your {person} and the {object}!"),
    "neutral": ("what about the {object} and your {person} now?", "the {object} and your {person}, noted."),
    "sad": ("the {object} and your {person} mattered.", "it is hard about your {person} and the {object}."),
    "surprise": ("who thought your {person} had the {object}?", "the {object}, and your {person} too?"),
}
FACT_TAILS = {
    "name": ("{name} from {city}, noted.", "hello {name}, how is {city}?"),
    "pet": ("how is {pet} the {animal}?", "say hello to {pet} the {animal}."),
    "job": ("how is {city} for a {job}?", "tell me about a {job} in {city}."),
    "age": ("{number} years, your {person}!", "so your {person} is {number} now."),
}
RECALL_TAILS = {
    "name": ("your name is {name}.", "you are {name}."),
    "city": ("you live in {city}.", "your home is {city}."),
    "pet": ("your {animal} is called {pet}.", "tell me more about {pet}."),
    "job": ("you work as a {job}.", "you are a {job}."),
    "number": ("your {person} is {number} years old.", "your {person} is {number}."),
    "person": ("your {person} {verb} the {object}.", "it was your {person} with the {object}."),
    "object": ("your {person} {verb} the {object}.", "it was your {person} with the {object}."),
}
# Where the history is not given (the counter-emotional prompt knows the sentence only), no fact can be recalled.
FORGOTTEN_TAILS = ("please tell me again.", "tell me more about it.")

# The pair of slots by whose values each kind is divided between the splits.
PAIRS = {
    "event": ("person", "object"),
    "name": ("name", "city"),
    "pet": ("animal", "pet"),
    "job": ("job", "city"),
    "age": ("person", "number"),
}
RECALL_SHARE = 0.62  # of the user's sentences after the first: about 0.4 of all replies


def split_of(pair):
    """The split that a pair of content words belongs to: `train` (80%), `validation` (8%) or `test` (12%).

    Args:
        pair: two words, in any order.
    """
    value = int.from_bytes(hashlib.sha256(" ".join(sorted(pair)).encode()).digest()[:4], "big") % 100
    return SPLITS[sum(value >= bound for bound in SPLIT_BOUNDS)]


def _slots(template):
    return re.findall(r"{(\w+)}", template)


def _fillers(kind, rng):
    """Values of every slot that a sentence of this kind can have."""
    verbs, objects = TOPICS[rng.choice(list(TOPICS))]
    return {
        "kind": kind,
        "person": rng.choice(PERSONS),
        "verb": rng.choice(verbs),
        "object": rng.choice(objects),
        "adjective": rng.choice(ADJECTIVES),
        "colour": rng.choice(COLOURS),
        "day": rng.choice(DAYS),
        "city": rng.choice(CITIES),
        "name": rng.choice(NAMES),
        "animal": rng.choice(ANIMALS),
        "pet": rng.choice(PETS),
        "job": rng.choice(JOBS),
        "number": rng.choice(NUMBERS),
    }


def _new_fact(split, rng, told):
    """A fact of this split that no earlier fact of the conversation can be mixed up with."""
    used_kinds = {fact["kind"] for fact in told}
    while True:
        # One name and one job a person; events are the most varied part, so they get the largest share.
        kinds = [kind for kind in ("event", "event", "event", "name", "pet", "pet", "job", "age")]
        kind = rng.choice([kind for kind in kinds if kind in ("event", "pet", "age") or kind not in used_kinds])
        fact = _fillers(kind, rng)
        if split_of([fact[slot] for slot in PAIRS[kind]]) != split:
            continue
        # Nothing is told of twice: two facts of one person, animal, city or object would make a question ambiguous.
        keys = {fact[slot] for slot in (*PAIRS[kind], "verb")}
        if all(keys.isdisjoint(old[slot] for slot in (*PAIRS[old["kind"]], "verb")) for old in told):
            return fact


def _with_emotion(clause, emotion, reveals, rng):
    """The user's sentence; a phrase that names the emotion stands before or after the clause if `reveals`."""
    end = "" if clause[-1] in ".?" else "."
    if not reveals:
        return clause + end
    phrase = rng.choice(REVEALING[emotion])
    if clause[-1] == "?" or rng.random() < 0.5:
        return f"{phrase}, {clause}{end}"
    return f"{clause.rstrip('.')}, {phrase}."


def _tell(fact, emotion, reveals, rng):
    templates = CLAUSES[fact["kind"]]
    template = templates[0] if reveals and fact["kind"] == "event" else rng.choice(templates)
    text = _with_emotion(template.format(**fact), emotion, reveals, rng)
    return text, {"recall": None, **{key: fact[key] for key in ("kind", "verb", *PAIRS[fact["kind"]])}}


def _ask(fact, emotion, reveals, rng):
    """A sentence whose reply needs `fact`."""
    template, slot = rng.choice(RECALLS[fact["kind"]])
    other = rng.choice([person for person in PERSONS if person != fact["person"]])
    values = {**fact, "other": other, "day": rng.choice(DAYS), "place": rng.choice(CITIES)}
    text = _with_emotion(template.format(**values), emotion, reveals, rng)
    return text, {"recall": slot, **{key: fact[key] for key in ("kind", "verb", *PAIRS[fact["kind"]])}}


def forget(context):
    """The same context for someone who has not seen the history: a reply to it names no recalled fact."""
    return {**context, "forgotten": context["recall"] is not None}


def reply_for(context, emotion, rng):
    """A reply in the style of `emotion` to the sentence that `context` stands for; any emotion is possible.

    Args:
        context: the `context` of a user's turn (see `make_dialogues`), or what `forget` makes of it.
        emotion: one of the seven of `EMOTIONS`.
        rng: `random.Random`.
    """
    if emotion not in OPENERS:
        raise ValueError(f"unknown emotion {emotion!r}: take one of {', '.join(EMOTIONS)}")
    opener = rng.choice(OPENERS[emotion])
    if context.get("forgotten"):
        tails = FORGOTTEN_TAILS
    elif context["recall"] is not None:
        tails = RECALL_TAILS[context["recall"]]
    elif context["kind"] == "event":
        tails = EVENT_TAILS[emotion]
    else:
        tails = FACT_TAILS[context["kind"]]
    return f"{opener} {rng.choice(tails).format(**context)}"


def _pair_in(text, context):
    """The content pair of `context` if the text says both of its words, else None."""
    pair = [context[slot] for slot in PAIRS[context["kind"]]]
    return pair if set(pair) <= set(words_of(text)) else None


def _make_dialogue(split, rng):
    told, turns = [], []
    for index in range(rng.choice((2, 3, 3, 4))):
        emotion, reveals = rng.choice(EMOTIONS), rng.random() < 0.5
        if index and rng.random() < RECALL_SHARE:
            text, context = _ask(rng.choice(told), emotion, reveals, rng)
        else:
            fact = _new_fact(split, rng, told)
            told.append(fact)
            text, context = _tell(fact, emotion, reveals, rng)
        reply = reply_for(context, emotion, rng)
        turns.append(
            {
                "speaker": USER,
                "text": text,
                "emotion": emotion,
                "reveals": reveals,
                "recall": [],
                "pair": _pair_in(text, context),
                "context": context,
            }
        )
        turns.append(
            {
                "speaker": ASSISTANT,
                "text": reply,
                "emotion": None,
                "reveals": None,
                "recall": [context[context["recall"]]] if context["recall"] else [],
                "pair": _pair_in(reply, context),
                "context": context,
            }
        )
    return turns


def make_dialogues(num, seed=0, split="train"):
    """Conversations of 4 to 8 turns; the user speaks first, the assistant answers each sentence.

    Args:
        num: how many.
        seed: the same seed, number and split give the same conversations.
        split: `train`, `validation` or `test`; their content pairs are disjoint.

    Returns:
        A list of conversations, each a list of turns, each a dict of
        `speaker` (`USER` or `ASSISTANT`), `text`, `emotion` (one of the seven; None in the assistant's turns),
        `reveals` (whether the words tell the emotion; None in the assistant's turns),
        `recall` (words of the assistant's turn that only the history before the sentence can give; may be empty),
        `pair` (the two content words by which the utterance is held out, or None for a generic one) and
        `context` (what `reply_for` needs).
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: take one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split} {seed}")
    return [_make_dialogue(split, rng) for _ in range(num)]


def unseen_utterances(dialogues, training):
    """Distinct texts of `dialogues` that say a content pair and that do not occur in `training`, in order.

    By construction no pair of two splits is the same; the texts are compared all the same.
    """
    seen = {turn["text"] for dialogue in training for turn in dialogue}
    texts = [turn["text"] for dialogue in dialogues for turn in dialogue if turn["pair"] is not None]
    return [text for text in dict.fromkeys(texts) if text not in seen]


def emotion_sentences(num, seed=0):
    """Sentences that tell an emotion in words, to train a text emotion classifier on (it stands in for GoEmotions').

    One half are sentences of the user, the other half replies of the assistant; all contents are of the training split.

    Returns:
        A list of (sentence, emotion), the emotions equally often.
    """
    rng = random.Random(f"emotion sentences {seed}")
    pairs = []
    for index in range(num):
        emotion = EMOTIONS[index % len(EMOTIONS)]
        fact = _new_fact("train", rng, [])
        make = _ask if rng.random() < 0.3 else _tell
        text, context = make(fact, emotion, True, rng)
        if index // len(EMOTIONS) % 2:
            text = reply_for(context, emotion, rng)
        pairs.append((text, emotion))
    rng.shuffle(pairs)
    return pairs


def words_of(text):
    """The words of a text, without punctuation."""
    return re.findall(r"[a-z]+", text.lower())


def grammar_words():
    """Every word that the grammar can say, and the speakers' names, sorted."""
    templates = [clause for clauses in CLAUSES.values() for clause in clauses]
    templates += [text for recalls in RECALLS.values() for text, _ in recalls]
    for group in (REVEALING, OPENERS, EVENT_TAILS, FACT_TAILS, RECALL_TAILS):
        templates += [text for texts in group.values() for text in texts]
    templates += FORGOTTEN_TAILS
    words = {word for text in templates for word in words_of(re.sub(r"{\w+}", " ", text))}
    return sorted(words | CONTENT_WORDS | set(EMOTIONS) | {USER, ASSISTANT})
