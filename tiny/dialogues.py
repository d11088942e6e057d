"""The text of the tiny preset: a grammar of two-party conversations between a user and an assistant.

The grammar has these properties:

- Half of the user's sentences do not reveal their emotion in words. So text alone identifies at most
  1/2 + 1/2 * 1/7 = 0.57 of the emotions, and a model needs the face and the voice.
- The assistant's reply depends on the emotion and on the content of the sentence that it answers.
- The user asks later about facts from earlier turns (a name, a city, a pet, a job, an age, who did what): `recall`
  lists the words of a reply that only the history can provide.
- Splits are disjoint by content: every utterance with content has a pair of content words, and the hash of the pair
  assigns it to exactly one split. Short phrases without a pair ("who am i again?") occur in every split; measure
  reconstruction on `unseen_utterances` only.
"""

import hashlib
import random
import re

from ..configuration_empathic import EMOTIONS

USER, ASSISTANT = "user", "assistant"  # the roles that `ChatSession` uses as names
SPLITS = ("train", "validation", "test")
# Upper bounds, in percent, of the hash values of `train` and `validation`; `test` has the rest.
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
COLORS = "red blue green grey black white brown golden".split()
ADJECTIVES = [*"old new small big cheap heavy round wooden".split(), *COLORS]
PERSONS = (
    "mother father sister brother aunt uncle cousin boss neighbour teacher friend wife husband grandma daughter doctor"
).split()
JOBS = "baker nurse pilot lawyer farmer plumber tailor waiter driver singer writer painter".split()
NUMBERS = (
    "two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty ninety"
).split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()

# The past tense of each verb equals its participle, so that it fits active and passive sentences.
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

# The user's clauses by kind. The first clause for events is the short clause that is combined with an emotion phrase.
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
# Sentences whose answer is in the history: kind of the fact -> (sentence, slot to recall).
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

# The user's phrases that reveal the emotion in words.
REVEALING = {
    "angry": ("i am furious", "it makes me mad", "i could scream", "how dare they"),
    "disgust": ("it was revolting", "i feel sick", "it smelled awful", "so disgusting"),
    "fearful": ("i am scared", "i am trembling", "it frightens me", "i feel afraid"),
    "happy": ("i am delighted", "i feel great", "i am smiling", "what a joy"),
    "neutral": ("nothing special", "as usual", "just so you know", "by the way"),
    "sad": ("i am heartbroken", "i feel lonely", "i keep crying", "i am in tears"),
    "surprise": ("i am amazed", "i am stunned", "out of nowhere", "can you imagine"),
}
# The beginning of the assistant's reply to each emotion, and the rest of a reply about an event.
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
# Without the history (the counter-emotional prompt has only the sentence), a reply cannot recall a fact.
FORGOTTEN_TAILS = ("please tell me again.", "tell me more about it.")

# The pair of slots whose values assign a fact of each kind to a split.
PAIRS = {
    "event": ("person", "object"),
    "name": ("name", "city"),
    "pet": ("animal", "pet"),
    "job": ("job", "city"),
    "age": ("person", "number"),
}
RECALL_SHARE = 0.62  # share of questions among the user's sentences after the first: about 0.4 of all replies


def split_of(pair):
    """Return the split of a pair of content words: `train` (80%), `validation` (8%) or `test` (12%).

    Args:
        pair: two words, in any order.
    """
    value = int.from_bytes(hashlib.sha256(" ".join(sorted(pair)).encode()).digest()[:4], "big") % 100
    return SPLITS[sum(value >= bound for bound in SPLIT_BOUNDS)]


def _slots(template):
    return re.findall(r"{(\w+)}", template)


def _fillers(kind, rng):
    """Draw a value for every slot of a sentence of this kind."""
    verbs, objects = TOPICS[rng.choice(list(TOPICS))]
    return {
        "kind": kind,
        "person": rng.choice(PERSONS),
        "verb": rng.choice(verbs),
        "object": rng.choice(objects),
        "adjective": rng.choice(ADJECTIVES),
        "colour": rng.choice(COLORS),
        "day": rng.choice(DAYS),
        "city": rng.choice(CITIES),
        "name": rng.choice(NAMES),
        "animal": rng.choice(ANIMALS),
        "pet": rng.choice(PETS),
        "job": rng.choice(JOBS),
        "number": rng.choice(NUMBERS),
    }


def _new_fact(split, rng, told):
    """Draw a fact of this split that cannot be confused with an earlier fact of the conversation."""
    used_kinds = {fact["kind"] for fact in told}
    while True:
        # A person has one name and one job; events are the most varied kind, so they have the largest share.
        kinds = [kind for kind in ("event", "event", "event", "name", "pet", "pet", "job", "age")]
        kind = rng.choice([kind for kind in kinds if kind in ("event", "pet", "age") or kind not in used_kinds])
        fact = _fillers(kind, rng)
        if split_of([fact[slot] for slot in PAIRS[kind]]) != split:
            continue
        # Two facts about one person, animal, city or object would make a question ambiguous.
        keys = {fact[slot] for slot in (*PAIRS[kind], "verb")}
        if all(keys.isdisjoint(old[slot] for slot in (*PAIRS[old["kind"]], "verb")) for old in told):
            return fact


def _with_emotion(clause, emotion, reveals, rng):
    """Return the user's sentence; if `reveals`, with an emotion phrase before or after the clause."""
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
    """Return a sentence whose reply needs `fact`."""
    template, slot = rng.choice(RECALLS[fact["kind"]])
    other = rng.choice([person for person in PERSONS if person != fact["person"]])
    values = {**fact, "other": other, "day": rng.choice(DAYS), "place": rng.choice(CITIES)}
    text = _with_emotion(template.format(**values), emotion, reveals, rng)
    return text, {"recall": slot, **{key: fact[key] for key in ("kind", "verb", *PAIRS[fact["kind"]])}}


def forget(context):
    """Return the context without the history: a reply to it names no recalled fact."""
    return {**context, "forgotten": context["recall"] is not None}


def reply_for(context, emotion, rng):
    """Return a reply in the style of `emotion` to the sentence that `context` describes; any emotion is possible.

    Args:
        context: `context` of a user turn (see `make_dialogues`), or the result of `forget`.
        emotion: one of `EMOTIONS`.
        rng: `random.Random`.
    """
    if emotion not in OPENERS:
        raise ValueError(f"Unknown emotion {emotion!r}; give one of {', '.join(EMOTIONS)}.")
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
    """Return the content pair of `context` if the text contains both words, else None."""
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
    """Make conversations of 4 to 8 turns; the user speaks first, the assistant answers each sentence.

    Args:
        num: number of conversations.
        seed: random seed; number, seed and split determine the conversations.
        split: `train`, `validation` or `test`; their content pairs are disjoint.

    Returns:
        A list of conversations, each a list of turns, each a dict of
        `speaker` (`USER` or `ASSISTANT`), `text`, `emotion` (one of the seven; None in the assistant's turns),
        `reveals` (whether the words reveal the emotion; None in the assistant's turns),
        `recall` (words of the assistant's turn that only the history before the sentence can provide; may be empty),
        `pair` (the two content words that determine the split, or None for a generic utterance) and
        `context` (input of `reply_for`).
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; give one of {', '.join(SPLITS)}.")
    rng = random.Random(f"{split} {seed}")
    return [_make_dialogue(split, rng) for _ in range(num)]


def contrast_sentences(num, seed=0):
    """Make sentences of the test split that do not reveal an emotion, with the assistant's reply to each emotion.

    Args:
        num: number of sentences; all are different.
        seed: random seed.

    Returns:
        A list of dicts of `text` and `replies` {emotion: text}.
    """
    rng = random.Random(f"contrast sentences {seed}")
    found = {}
    while len(found) < num:
        text, context = _tell(_new_fact("test", rng, []), None, False, rng)
        replies = {emotion: reply_for(context, emotion, rng) for emotion in EMOTIONS}
        found.setdefault(text, {"text": text, "replies": replies})
    return list(found.values())


def unseen_utterances(dialogues, training):
    """Return the distinct texts of `dialogues` that have a content pair and do not occur in `training`, in order.

    By construction two splits have no pair in common; the texts are still compared as a safeguard.
    """
    seen = {turn["text"] for dialogue in training for turn in dialogue}
    texts = [turn["text"] for dialogue in dialogues for turn in dialogue if turn["pair"] is not None]
    return [text for text in dict.fromkeys(texts) if text not in seen]


def emotion_sentences(num, seed=0):
    """Make sentences that reveal an emotion in words, to train the text emotion classifier (see `emotion_classifier`).

    One half are user sentences, the other half replies of the assistant; all contents are from the training split.

    Returns:
        A list of (sentence, emotion) with equally frequent emotions.
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
    """Return the words of a text, without punctuation."""
    return re.findall(r"[a-z]+", text.lower())


def grammar_words():
    """Return all words of the grammar, including the speakers' names, sorted."""
    templates = [clause for clauses in CLAUSES.values() for clause in clauses]
    templates += [text for recalls in RECALLS.values() for text, _ in recalls]
    for group in (REVEALING, OPENERS, EVENT_TAILS, FACT_TAILS, RECALL_TAILS):
        templates += [text for texts in group.values() for text in texts]
    templates += FORGOTTEN_TAILS
    words = {word for text in templates for word in words_of(re.sub(r"{\w+}", " ", text))}
    return sorted(words | CONTENT_WORDS | set(EMOTIONS) | {USER, ASSISTANT})
