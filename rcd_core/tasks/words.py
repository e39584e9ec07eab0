"""Names, things and places of the tasks in words."""

from __future__ import annotations

from collections.abc import Sequence


def words(text: str) -> list[str]:
    return text.split()


PEOPLE = words(
    """Ada Alan Amir Ana Anton Ben Bella Boris Carla Chen Clara Cora Dan Dora Eli Elsa Emil Erik Eva Felix Fiona Finn
    Gina Greta Hana Hugo Ida Igor Ines Ivan Jan Jana Jonas Julia Karim Kira Lara Lena Leo Lina Luca Maja Marek Maria Mia
    Milan Nadia Nina Noah Nora Olga Omar Oscar Paula Pavel Petra Rafael Rita Rosa Sam Sara Selma Simon Sofia Tara Theo
    Tom Ugo Vera Victor Wanda Yara Yuri Zara Zoe"""
)
THINGS = words(
    """acorns almonds apples arrows badges bagels balls bananas barrels baskets batteries beads beans bells books boots
    bottles bowls boxes bricks brushes buckets buttons cakes candles caps cards carrots chairs cherries chestnuts coats
    coins combs cookies crates crayons cups daisies dates dolls drums eggs envelopes erasers feathers figs flags flowers
    forks gloves grapes hammers hats herbs hooks jars kites knives ladders lamps leaves lemons letters lilies limes
    magnets maps marbles masks melons mugs mushrooms nails needles nuts olives onions oranges paddles pages pans pearls
    pears pebbles pencils peppers pillows pins plates plums postcards pots potatoes radishes ribbons rings ropes roses
    rulers saddles seeds shells shirts shoes socks spoons stamps stars stickers stones straws tickets tiles tomatoes
    tools towels toys trays tulips turnips vases walnuts wheels whistles"""
)
SINGLE_THINGS = words(
    """accordion anchor anvil axe banjo barometer basin blanket brooch bucket bugle bust cabinet camera
    candlestick canvas carpet cello chain chisel clarinet clock compass cradle crown cushion cymbal dagger diary
    dictionary drum easel fiddle flute globe goblet guitar hammock harp helmet horn hourglass jug kettle lamp
    lantern lever loom lute magnet mandolin manuscript map mask medal microscope mirror mosaic necklace oboe oven
    painting parasol pendulum piano pitcher poster pulley puppet quilt radio recorder rug saddle saw saxophone
    scale scroll sculpture shield sickle sofa spade spear statue stove sundial sword tambourine tapestry telephone
    telescope thimble torch trombone trophy trumpet trunk typewriter umbrella urn vase viola violin wallet watch
    whistle wreath xylophone"""
)
PLACES = words(
    """airport attic bakery balcony barn beach bridge cabin camp castle cellar chapel church cinema clinic corner
    cottage desert dock factory farm field forest fountain gallery garage garden gate hall harbour hill hostel hotel
    island kitchen lake library lighthouse market meadow mill museum office orchard palace park pier playground pond
    porch port school shed shop square stable stadium station studio temple theatre tower valley
    village vineyard workshop"""
)


def pick(items: Sequence[str], u: float) -> str:
    """The item at u in [0, 1)."""
    return items[int(u * len(items))]


def pick_several(items: Sequence[str], draws: Sequence[float]) -> list[str]:
    """As many different items as draws in [0, 1)."""
    left, found = list(items), []
    for u in draws:
        found.append(left.pop(int(u * len(left))))
    return found
