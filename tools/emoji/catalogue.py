"""The curated class tree: domain -> superclass -> (classes, held-out near-OOD classes).

An entry is an emoji's CLDR name, or `class name=emoji|emoji` where several emoji are drawn of the same thing.
No name stands for two nodes of the tree, so that parent-child tables stay unambiguous.
"""

from __future__ import annotations

Entries = tuple[str, ...]

# fmt: off
TREE: dict[str, dict[str, tuple[Entries, Entries]]] = {
    "animal": {
        "mammal": (
            (
                "dog=dog|dog face|poodle", "cat=cat|cat face", "monkey=monkey|monkey face",
                "horse=horse|horse face", "cow=cow|cow face", "pig=pig|pig face", "rabbit=rabbit|rabbit face",
                "mouse=mouse|mouse face", "tiger=tiger|tiger face", "elephant", "bear", "panda", "sheep=ram|ewe",
            ),
            (
                "lion", "wolf", "fox", "goat", "koala", "hamster", "camel=camel|two-hump camel", "rhinoceros",
            ),
        ),
        "bird": (
            (
                "chicken=chicken|rooster", "baby chick=baby chick|front-facing baby chick|hatching chick",
                "penguin", "owl", "duck", "songbird=bird",
            ),
            (
                "eagle", "turkey", "dove", "flamingo",
            ),
        ),
        "sea animal": (
            (
                "fish=fish|tropical fish", "dolphin", "whale=whale|spouting whale", "octopus", "crab", "shark",
            ),
            (
                "blowfish", "squid", "shrimp", "lobster",
            ),
        ),
        "reptile": (
            (
                "crocodile", "turtle", "snake", "lizard", "frog", "dragon=dragon|dragon face",
            ),
            (
                "T-Rex", "sauropod",
            ),
        ),
        "insect": (
            (
                "snail", "butterfly", "ant", "honeybee", "lady beetle", "spider",
            ),
            (
                "cricket", "scorpion", "bug", "mosquito",
            ),
        ),
    },
    "plant": {
        "flower": (
            (
                "rose", "tulip", "sunflower", "cherry blossom", "hibiscus", "bouquet",
            ),
            (
                "blossom", "lotus", "wilted flower",
            ),
        ),
        "wild plant": (
            (
                "palm tree", "evergreen tree", "deciduous tree", "cactus",
                "four leaf clover=four leaf clover|shamrock", "maple leaf", "mushroom",
            ),
            (
                "seedling", "fallen leaf", "sheaf of rice", "potted plant",
            ),
        ),
    },
    "food": {
        "fruit": (
            (
                "apple=red apple|green apple", "banana", "grapes", "watermelon", "lemon", "pineapple",
                "strawberry", "cherries", "pear",
            ),
            (
                "peach", "tangerine", "kiwi fruit", "melon", "mango",
            ),
        ),
        "vegetable": (
            (
                "tomato", "carrot", "eggplant", "ear of corn", "potato", "avocado", "hot pepper",
            ),
            (
                "cucumber", "broccoli", "onion", "garlic",
            ),
        ),
        "dish": (
            (
                "hamburger", "pizza", "hot dog", "french fries", "bread", "croissant", "sushi", "spaghetti",
                "egg=egg|cooking",
            ),
            (
                "taco", "pancakes", "rice ball", "fried shrimp", "popcorn",
            ),
        ),
        "dessert": (
            (
                "ice cream=ice cream|soft ice cream", "doughnut", "cookie", "birthday cake", "candy", "lollipop",
            ),
            (
                "chocolate bar", "shortcake", "custard", "cupcake",
            ),
        ),
        "drink": (
            (
                "beer=beer mug|clinking beer mugs", "wine glass", "cocktail glass", "hot beverage", "baby bottle",
            ),
            (
                "tropical drink", "sake", "teacup without handle", "glass of milk",
            ),
        ),
    },
    "vehicle": {
        "road vehicle": (
            (
                "car=automobile|oncoming automobile|sport utility vehicle", "bus=bus|oncoming bus|trolleybus",
                "taxi=taxi|oncoming taxi", "police car=police car|oncoming police car",
                "truck=delivery truck|articulated lorry", "fire engine", "bicycle", "motorcycle", "tractor",
            ),
            (
                "ambulance", "racing car", "motor scooter", "minibus",
            ),
        ),
        "rail vehicle": (
            (
                "steam locomotive=locomotive", "train=train|metro|high-speed train|bullet train",
                "tram=tram|light rail|tram car",
            ),
            (
                "monorail", "mountain railway", "railway car",
            ),
        ),
        "watercraft": (
            (
                "sailboat", "ship", "speedboat=speedboat|motor boat", "canoe",
            ),
            (
                "passenger ship", "ferry",
            ),
        ),
        "aircraft": (
            (
                "airplane=airplane|small airplane", "helicopter", "rocket",
            ),
            (
                "satellite", "parachute",
            ),
        ),
    },
    "place": {
        "building": (
            (
                "house=house|house with garden|houses", "church", "castle=castle|Japanese castle", "factory",
                "hospital", "office building", "mosque",
            ),
            (
                "school", "bank", "hotel", "post office", "convenience store",
            ),
        ),
        "landscape": (
            (
                "mountain=mountain|snow-capped mountain|mount fuji", "volcano", "desert island",
                "tent=tent|camping", "ferris wheel", "fountain",
            ),
            (
                "desert", "roller coaster", "national park",
            ),
        ),
    },
    "artifact": {
        "clothing": (
            (
                "dress", "jeans", "t-shirt", "necktie", "high-heeled shoe", "running shoe", "top hat", "crown",
                "glasses",
            ),
            (
                "kimono", "bikini", "man's shoe", "woman's boot", "woman's hat", "socks",
            ),
        ),
        "bag": (
            (
                "handbag=handbag|purse", "backpack", "briefcase",
            ),
            (
                "clutch bag", "luggage", "shopping bags",
            ),
        ),
        "musical instrument": (
            (
                "guitar", "violin", "trumpet", "drum", "saxophone", "musical keyboard",
            ),
            (
                "banjo", "accordion", "maracas",
            ),
        ),
        "electronics": (
            (
                "laptop", "camera=camera|camera with flash", "television", "mobile phone", "telephone", "printer",
                "desktop computer", "headphone", "battery",
            ),
            (
                "fax machine", "video camera", "radio", "video game",
            ),
        ),
        "tool": (
            (
                "hammer", "wrench", "scissors", "key=key|old key", "bomb", "shield",
                "magnifying glass=magnifying glass tilted left|magnifying glass tilted right", "syringe",
            ),
            (
                "axe", "screwdriver", "dagger", "nut and bolt", "pick",
            ),
        ),
        "office item": (
            (
                "pencil", "envelope", "book=closed book|green book|blue book|orange book", "clipboard",
                "calendar=calendar|tear-off calendar", "paperclip=paperclip|linked paperclips",
            ),
            (
                "scroll", "pushpin", "newspaper", "notebook",
            ),
        ),
        "household item": (
            (
                "bathtub", "bed", "toilet", "door", "clock=alarm clock|mantelpiece clock|stopwatch|timer clock",
                "umbrella=umbrella|closed umbrella", "light bulb", "candle",
            ),
            (
                "shower", "hourglass=hourglass done|hourglass not done", "bell", "gift=wrapped gift",
            ),
        ),
        "ball": (
            (
                "soccer ball", "basketball", "tennis", "baseball", "american football", "bowling",
            ),
            (
                "volleyball", "pool 8 ball", "rugby football",
            ),
        ),
    },
}

# Far-OOD: whole subgroups of emoji that share nothing with the tree, a few of each.
FAR_SUBGROUPS = (
    "face-smiling", "face-concerned", "geometric", "arrow", "zodiac", "alphanum", "keycap", "country-flag", "heart",
    "hand-fingers-closed", "transport-sign", "av-symbol",
)
# fmt: on
FAR_PER_SUBGROUP = 8
FAR_MIN_STYLES = 5  # taken only if at least this many styles draw it

DEFAULT_PER_SUPERCLASS = 4  # the default label set: the alphabetically first four classes of each superclass


def parse_entry(entry: str) -> tuple[str, tuple[str, ...]]:
    """Return (class name, emoji labels) of one entry.

    Example:
        >>> parse_entry("dog=dog|dog face")
        ('dog', ('dog', 'dog face'))
        >>> parse_entry("bear")
        ('bear', ('bear',))
    """
    name, _, labels = entry.partition("=")
    return name, tuple((labels or name).split("|"))
