"""A category's words: pairs to learn from, prompts to leave alone, and prompts that only evaluation uses."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

from safepatch.data.category import CategoryFile, Phrases, Rewrite, category_path, find_file, read_category
from safepatch.data.keys import digest
from safepatch.data.prompts import EMPTY, Pair, Prompt
from safepatch.data.readers import read_prompts
from safepatch.data.twins import Guide, caption_twin, file_pairs, settled
from safepatch.data.words import Words, common_words, noun, written_words
from safepatch.errors import ConfigError, PromptError, lookup
from safepatch.taxonomy import Category

# Shares of what is preserved, of those sets that a corpus has. With neighbours a patch learns to do its own job only.
RETAIN_SHARES: dict[str, float] = {"file": 0.35, "benign": 0.35, "lookalike": 0.25, "other": 0.25, "empty": 0.15}
COMPANIONS = 0.65  # share of the unsafe prompts of training that show a harmless thing too
TRIES = 50  # for a neighbour's prompt without anything of the category
SHOWN_CONCEPTS = 8  # of those that the teacher of a prompt that names none is pushed away from


class Corpus:
    """One category's words.

    Args:
        category: what the words are for.
        pairs: (unsafe, safe) prompts, or their texts.
        retain: prompts, or texts, that must stay as they are.
        heldout: unsafe prompts, or texts, for evaluation only.
        words: what captions are made of, beside or instead of `pairs`; by default the shipped vocabulary of common
            things, without concepts.
        rewrite: where the safe twins of captions come from; `guided` also says how the teacher is pushed.
        neighbours: corpora of other categories, which a patch must leave alone.
        notes: what was read, a line for each file.
    """

    def __init__(
        self,
        category: Category,
        pairs: Iterable[tuple[Prompt | str, Prompt | str]] = (),
        retain: Iterable[Prompt | str] = (),
        heldout: Iterable[Prompt | str] = (),
        words: Words | None = None,
        rewrite: Rewrite | None = None,
        neighbours: Sequence["Corpus"] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self.category = category
        self.words = words or common_words()
        self.rewrite = rewrite or Rewrite(by="column" if not self.words.concepts else "replace")
        self.neighbours = tuple(neighbours)
        self.notes = tuple(notes)
        self._pairs = tuple(Pair(_prompt(unsafe), _twin(safe)) for unsafe, safe in pairs)
        self._retain = tuple(map(_prompt, retain))
        self._heldout = tuple(map(_prompt, heldout))
        if not self._pairs and not self.words.concepts:
            raise ConfigError(f"the corpus of '{category.name}' has no words; give pairs, or words with concepts")
        known = ((i, pair.unsafe.text) for i, pair in enumerate(self._pairs, start=1))
        unseen = ((i, prompt.text) for i, prompt in enumerate(self._heldout, start=1))
        _refuse_overlap(known, unseen, category.name)

    @classmethod
    def open(cls, name: str | Path) -> "Corpus":
        """The corpus of a shipped category by its name, or of a category file.

        Raises:
            ConfigError: for a category file that cannot be used.
            PromptError: for a prompt file that cannot be used; it says which row.
        """
        path = category_path(name)
        file = read_category(path)
        return _opened(file, path.parent, neighbours=[_neighbour(other, path) for other in file.neighbours])

    @property
    def name(self) -> str:
        """The category's."""
        return self.category.name

    def guide(self, pair: Pair) -> Guide | None:
        """How the teacher of a pair is pushed; None unless the rewrite is `guided`."""
        if self.rewrite.by != "guided":
            return None
        if pair.safe.text != pair.unsafe.text:
            return Guide(pair.unsafe.text, pair.safe.text, self.rewrite)
        return Guide(self._named, EMPTY.text, self.rewrite)

    @property
    def _named(self) -> str:
        """The category's concepts, as one prompt."""
        names = [noun(concept.name) for concept in self.words.concepts[:SHOWN_CONCEPTS]]
        return ", ".join(names) or self.category.definition

    @property
    def key(self) -> str:
        """A hash of all its words and how they are used; with a seed it tells which prompts come of them."""
        prompts = [[asdict(prompt) for prompt in some] for some in (*self._pairs, self._retain, self._heldout)]
        about = [asdict(part) for part in (self.category, self.words, self.rewrite)]
        return digest([about, prompts, [other.key for other in self.neighbours]])

    def pairs(self, n: int, seed: int, companions: float = COMPANIONS) -> list[Pair]:
        """`n` unsafe prompts with their safe twins; of files and of captions in turn where there are both.

        A share `companions` of the captions shows a harmless thing too. A small file's prompts come again, from other
        noise than the seed that it gives them.
        """
        rng = Random(f"pairs {self.name} {seed}")
        files = _cycled(self._pairs, n, rng)
        files = [pair._replace(unsafe=own) for pair, own in zip(files, _once([p.unsafe for p in files]), strict=True)]
        turns = [_turn(i, bool(self.words.concepts), bool(self._pairs)) for i in range(n)]
        return [files[i] if is_file else self._caption(i, rng, companions) for i, is_file in turns]

    def retain(self, n: int, seed: int) -> list[Prompt]:
        """`n` prompts that must stay as they are, mixed by `RETAIN_SHARES`; the empty prompt is among them."""
        rng = Random(f"retain {self.name} {seed}")
        sets = self._harmless_sets()
        kinds = rng.choices(list(sets), [RETAIN_SHARES[kind] for kind in sets], k=n)
        return _once([sets[kind](rng) for kind in kinds])

    def evaluation(self, name: str, n: int, seed: int) -> list[Prompt]:
        """Up to `n` prompts, each with a seed, for one of the sets of `EVALUATIONS`; none where there are no words.

        No two are equal in both, so that none is counted twice.

        Raises:
            UnknownName: for another set.
        """
        made = lookup(EVALUATIONS, name, what="prompt set")(self, n, seed)
        return [p if p.seed is not None else replace(p, seed=image_seed(seed, i)) for i, p in enumerate(_once(made))]

    def _caption(self, i: int, rng: Random, companions: float) -> Pair:
        beside = self.words.has_companions and rng.random() < companions
        unsafe, twin = self.words.unsafe(i, rng, beside)
        return Pair(unsafe, caption_twin(unsafe, twin, self.rewrite, self.words.concepts))

    def _harmless_sets(self) -> dict[str, Callable[[Random], Prompt]]:
        words, neighbours = self.words, self.neighbours
        sets: dict[str, Callable[[Random], Prompt]] = {"empty": lambda _: EMPTY}
        if self._retain:
            sets["file"] = lambda rng: rng.choice(self._retain)
        for name, things in (("benign", words.benign), ("lookalike", words.lookalikes)):
            if things:
                sets[name] = lambda rng, things=things: words.harmless(
                    things, rng.randrange(len(things)), rng, rng.random() < 0.5
                )
        if neighbours:
            sets["other"] = self._foreign
        return sets

    def _foreign(self, rng: Random) -> Prompt:
        """A neighbour's prompt; one whose companion is of this category would teach the opposite of its pairs."""
        prompts = (rng.choice(self.neighbours)._plain(rng) for _ in range(TRIES))
        return next((prompt for prompt in prompts if not self.words.mentions(prompt.text)), EMPTY)

    def _plain(self, rng: Random, i: int | None = None, heldout: bool = False) -> Prompt:
        """An unsafe prompt in wording that training knows, or in held-out wording; any, or the i-th."""
        known = self._heldout if heldout else tuple(pair.unsafe for pair in self._pairs)
        has_words = self.words.has_heldout if heldout else bool(self.words.concepts)
        place, is_file = _turn(rng.randrange(1 << 20) if i is None else i, has_words, bool(known))
        if is_file:
            return known[place % len(known)]
        paired = rng.random() < 0.5 if i is None else (place // len(self.words.concepts)) % 2 == 1
        return self.words.unsafe(place, rng, paired and self.words.has_companions, heldout)[0]


def image_seed(seed: int, i: int) -> int:
    """Of the i-th image of an evaluation, so that base and patched start from the same noise."""
    return 1_000_000 * (seed + 1) + i


def _unsafe(corpus: Corpus, n: int, seed: int, heldout: bool = False) -> list[Prompt]:
    """Each concept equally often, in every other round beside something harmless."""
    rng = Random(f"unsafe {corpus.name} {seed} {heldout}")
    return [corpus._plain(rng, i, heldout) for i in range(n)]


def _heldout_prompts(corpus: Corpus, n: int, seed: int) -> list[Prompt]:
    return _unsafe(corpus, n, seed, heldout=True) if corpus._heldout or corpus.words.has_heldout else []


def _with_companion(corpus: Corpus, n: int, seed: int) -> list[Prompt]:
    """Those of the plain prompts that ask for something harmless too."""
    return [prompt for prompt in corpus.evaluation("plain", n, seed) if len(prompt.asks) > 1]


def _harmless(things: Sequence[Phrases], corpus: Corpus, n: int, rng: Random) -> list[Prompt]:
    return [corpus.words.harmless(things, i, rng, rng.random() < 0.5) for i in range(n)] if things else []


def _lookalike(corpus: Corpus, n: int, seed: int) -> list[Prompt]:
    return _harmless(corpus.words.lookalikes, corpus, n, Random(f"lookalike {corpus.name} {seed}"))


def _benign(corpus: Corpus, n: int, seed: int) -> list[Prompt]:
    rng = Random(f"benign {seed}")  # so that categories with the same words are measured by the same prompts
    made, files = _harmless(corpus.words.benign, corpus, n, rng), _cycled(corpus._retain, n, rng)
    return [files[i] if files and i % 2 else prompt for i, prompt in enumerate(made)] or files


def _others(corpus: Corpus, n: int, seed: int) -> list[Prompt]:
    share = max(1, n // max(1, len(corpus.neighbours)))
    return [prompt for other in corpus.neighbours for prompt in other.evaluation("plain", share, seed)]


# What evaluation asks for: name -> prompts of a corpus.
EVALUATIONS: dict[str, Callable[[Corpus, int, int], list[Prompt]]] = {
    "plain": _unsafe,
    "heldout": _heldout_prompts,
    "companion": _with_companion,
    "lookalike": _lookalike,
    "benign": _benign,
    "other": _others,
}


def _opened(file: CategoryFile, folder: Path, neighbours: Sequence[Corpus] = ()) -> Corpus:
    """The corpus of what a category file in `folder` says."""
    words, notes = written_words(file, folder)
    rewrite, pairs, read = file.rewrite, [], None
    if file.pairs:
        read = read_prompts(find_file(file.pairs, folder), safe=rewrite.column)
        rewrite = settled(rewrite, file, read)
        pairs, left_out = file_pairs(read, rewrite, file)
        notes += [read.described(), *left_out]
    else:
        rewrite = settled(rewrite, file, None)
    retain = [read_prompts(find_file(name, folder)) for name in file.retain]
    heldout = [read_prompts(find_file(file.heldout, folder))] if file.heldout else []
    notes += [each.described() for each in (*retain, *heldout)]
    if read and heldout:
        known, unseen = ([(line.number, line.text) for line in some.lines] for some in (read, heldout[0]))
        _refuse_overlap(known, unseen, file.name)
    kept, unseen = ([line.prompt for each in some for line in each.lines] for some in (retain, heldout))
    return Corpus(file.category, pairs, kept, unseen, words, rewrite, neighbours, notes)


def _neighbour(name: str, path: Path) -> Corpus:
    """Of another category its words only, not what it leaves alone."""
    other = path.parent / name if (path.parent / name).is_file() else category_path(name)
    return _opened(read_category(other), other.parent)


def _prompt(given: Prompt | str) -> Prompt:
    return given if isinstance(given, Prompt) else Prompt(given)


def _twin(given: Prompt | str) -> Prompt:
    return EMPTY if given == "" else _prompt(given)


def _turn(i: int, has_words: bool, has_file: bool) -> tuple[int, bool]:
    """The number of the i-th prompt among its own kind, and whether it is the file's: where both are, in turn."""
    return (i // 2, bool(i % 2)) if has_words and has_file else (i, has_file)


def _cycled(items: Sequence, n: int, rng: Random) -> list:
    """`n` of `items` in random order, each as often as any other."""
    made: list = []
    while items and len(made) < n:
        made += rng.sample(list(items), len(items))
    return made[:n]


def _once(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts in their order; one that comes again brings no seed, so that it is drawn from other noise."""
    known, made = set[tuple[str, int]](), list[Prompt]()
    for prompt in prompts:
        place = (prompt.text, prompt.seed) if prompt.seed is not None else None
        made.append(replace(prompt, seed=None) if place in known else prompt)
        known |= {place} if place else set()
    return made


def _refuse_overlap(pairs: Iterable[tuple[int, str]], heldout: Iterable[tuple[int, str]], name: str) -> None:
    """Raise `PromptError` if a held-out text is among the pairs; both come with their rows."""
    known = {_plain_text(text): row for row, text in pairs}
    for row, text in heldout:
        if _plain_text(text) in known:
            raise PromptError(
                f"category '{name}': held-out prompt {row} is row {known[_plain_text(text)]} of the pairs too "
                f"('{text[:60]}'); take it out of one file"
            )


def _plain_text(text: str) -> str:
    return " ".join(text.casefold().split())
