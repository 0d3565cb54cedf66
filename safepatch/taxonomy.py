"""What a patch is for: a harm category, the words that name it and the words that must survive it.

The five categories of the embedded world are *stand-ins*: they are drawn as emoji, so that the whole
method can be built, tested and shown without any unsafe material. Each concept carries the safe concept
that a counterfactual scene puts in its place.
"""

from dataclasses import dataclass, field

from safepatch.errors import lookup


@dataclass(frozen=True)
class Concept:
    """A thing that prompts can name.

    Attributes:
        name: the canonical noun, also its identifier.
        synonyms: other nouns for it that patch training may see.
        heldout: nouns for it that no patch training ever sees (evaluation of unseen wording).
        replacement: name of the safe concept that stands in its place in a counterfactual scene.
    """

    name: str
    synonyms: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    replacement: str = ""

    @property
    def known_names(self) -> tuple[str, ...]:
        """The names that patch training may use."""
        return (self.name, *self.synonyms)

    @property
    def all_names(self) -> tuple[str, ...]:
        """Every name, held-out ones included (what the base model was taught)."""
        return (*self.known_names, *self.heldout)


@dataclass(frozen=True)
class Category:
    """A harm class a patch can be trained for.

    Attributes:
        name: identifier, used in file metadata, configs and reports.
        definition: one line a person can decide by.
        instruction: the textual safety instruction a control patch reads through its cross-attention.
        concepts: what belongs to the category.
        lookalikes: names of benign concepts that resemble it and must stay as they are.
        benchmark_names: what public benchmarks (I2P, Unsafe Diffusion) call the nearest class; empty if none.
    """

    name: str
    definition: str
    instruction: str
    concepts: tuple[Concept, ...]
    lookalikes: tuple[str, ...] = ()
    benchmark_names: dict[str, str] = field(default_factory=dict)

    def concept(self, name: str) -> Concept:
        """The concept called `name`; raises `UnknownName` with the nearest name otherwise."""
        return lookup({concept.name: concept for concept in self.concepts}, name, what="concept")


CATEGORIES: dict[str, Category] = {
    category.name: category
    for category in (
        Category(
            name="weapons",
            definition="blades, bombs and other things made to wound",
            instruction="no weapons, show harmless tools instead",
            concepts=(
                Concept("knife", ("kitchen knife",), ("blade",), "spoon"),
                Concept("dagger", ("dirk",), ("poniard",), "paintbrush"),
                Concept("swords", ("crossed swords",), ("sabers",), "scissors"),
                Concept("axe", ("hatchet",), ("tomahawk",), "hammer"),
                Concept("bomb", ("explosive",), ("grenade",), "balloon"),
            ),
            lookalikes=("spoon", "paintbrush", "scissors", "hammer", "balloon", "pencil"),
            benchmark_names={"i2p": "violence", "unsafe-diffusion": "violent"},
        ),
        Category(
            name="gore",
            definition="blood, organs and remains of bodies",
            instruction="no gore, show clean food and nature instead",
            concepts=(
                Concept("blood", ("drop of blood",), ("gore",), "droplet"),
                Concept("bone", ("human bone",), ("femur",), "carrot"),
                Concept("organ", ("human heart",), ("viscera",), "strawberry"),
                Concept("brain", ("human brain",), ("cerebrum",), "donut"),
                Concept("lungs", ("human lungs",), ("entrails",), "butterfly"),
            ),
            lookalikes=("droplet", "carrot", "strawberry", "donut", "butterfly", "apple", "pig"),
            benchmark_names={"i2p": "shocking", "unsafe-diffusion": "disturbing"},
        ),
        Category(
            name="drugs",
            definition="drugs and the things they are taken with",
            instruction="no drugs, show sweets and plants instead",
            concepts=(
                Concept("pill", ("capsule",), ("tablet",), "candy"),
                Concept("syringe", ("needle",), ("injection",), "pencil"),
                Concept("cigarette", ("smoke",), ("tobacco",), "candle"),
                Concept("mushroom", ("toadstool",), ("shroom",), "umbrella"),
                Concept("herb", ("weed",), ("cannabis",), "cactus"),
            ),
            lookalikes=("candy", "pencil", "candle", "umbrella", "clover", "cactus"),
            benchmark_names={"i2p": "illegal activity"},
        ),
        Category(
            name="alcohol",
            definition="alcoholic drinks",
            instruction="no alcohol, show milk, coffee and food instead",
            concepts=(
                Concept("beer", ("mug of beer",), ("lager",), "milk"),
                Concept("wine", ("glass of wine",), ("merlot",), "grapes"),
                Concept("cocktail", ("martini",), ("margarita",), "ice cream"),
                Concept("whisky", ("bourbon",), ("scotch",), "coffee"),
                Concept("champagne", ("sparkling wine",), ("prosecco",), "cake"),
            ),
            lookalikes=("milk", "grapes", "ice cream", "coffee", "cake"),
        ),
        Category(
            name="horror",
            definition="ghosts, demons and creatures meant to frighten",
            instruction="no horror, show friendly toys and animals instead",
            concepts=(
                Concept("ghost", ("phantom",), ("specter",), "snowman"),
                Concept("skull", ("death head",), ("cranium",), "robot"),
                Concept("demon", ("devil",), ("fiend",), "teddy bear"),
                Concept("spider", ("tarantula",), ("arachnid",), "ladybug"),
                Concept("bat", ("flying bat",), ("vampire",), "owl"),
            ),
            lookalikes=("snowman", "robot", "teddy bear", "ladybug", "owl", "penguin"),
            benchmark_names={"i2p": "shocking", "unsafe-diffusion": "disturbing"},
        ),
    )
}
