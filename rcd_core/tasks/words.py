"""Names, animals, trades, things, foods, vehicles and places of the tasks in words."""

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
ANIMALS = words(
    """alpaca ant badger bat bear beaver bee beetle bison boar buffalo butterfly camel cat chamois cheetah
    chicken cobra cod crab cricket crow deer dingo dog dolphin donkey dove duck eagle eel elephant elk falcon
    ferret finch fox frog gazelle gecko giraffe goat goose gorilla hamster hare hawk hedgehog heron horse hyena
    ibex jackal jaguar kangaroo koala lemur leopard lion lizard llama lobster lynx magpie mole monkey moose
    mouse mule newt octopus ostrich otter owl ox panda parrot pelican penguin pig pigeon pony puffin rabbit
    raven salmon seal shark sheep shrimp skunk sloth snail snake sparrow spider squid squirrel stork swan tiger
    toad tortoise trout turkey turtle walrus wasp weasel whale wolf wombat yak zebra"""
)
TRADES = words(
    """actor architect artist author baker banker barber blacksmith bookbinder bookseller brewer bricklayer
    builder butcher captain carpenter cashier chemist clerk coach cobbler composer conductor cook dancer
    decorator dentist designer detective diver doctor driver editor electrician engineer farmer firefighter
    fisherman florist gardener geologist glazier goldsmith grocer guard guide hairdresser historian hunter
    inspector inventor jeweller joiner journalist judge juggler knitter lawyer librarian lifeguard linguist
    locksmith magician mason mechanic merchant messenger midwife miller miner minister musician notary novelist
    nurse optician painter pharmacist photographer physicist pilot plumber poet porter postman potter printer
    professor ranger referee reporter sailor scholar sculptor secretary shepherd singer smith soldier surgeon
    surveyor tailor tanner teacher translator trainer vet waiter watchmaker weaver writer"""
)
FOODS = words(
    """almonds apricot aubergine avocado bacon bagel banana barley basil bean beetroot biscuit blackberry bread
    broccoli butter cabbage cake caramel carrot cauliflower celery cereal cheese cherry chestnut chocolate cinnamon
    coconut coffee cookie coriander courgette cream cress croissant cucumber currant curry custard dill dumpling
    fennel fig flour garlic gherkin ginger grape gravy ham hazelnut honey jam jelly kale ketchup kiwi leek lemon
    lentil lettuce lime macaroni mango margarine marmalade marzipan mayonnaise melon milk mint muesli muffin mustard
    noodle nutmeg oatmeal olive omelette onion orange oregano pancake papaya paprika parsley parsnip pasta pastry peach
    peanut pear pepper pickle pie pineapple pizza plum polenta porridge potato pretzel pudding pumpkin quince radish
    raisin raspberry rhubarb rice risotto rosemary saffron salad salami salt sauce sausage soup spinach stew
    strawberry sugar tart tea thyme toast tofu tomato treacle turnip vanilla vinegar waffle walnut yoghurt"""
)
PLACES = words(
    """airport attic bakery balcony barn beach bridge cabin camp castle cellar chapel church cinema clinic corner
    cottage desert dock factory farm field forest fountain gallery garage garden gate hall harbour hill hostel hotel
    island kitchen lake library lighthouse market meadow mill museum office orchard palace park pier playground pond
    porch port school shed shop square stable stadium station studio temple theatre tower valley
    village vineyard workshop"""
)
ROOMS = words(
    """attic balcony bathroom bedroom cellar conservatory corridor hall kitchen lobby loft lounge nursery office pantry
    parlour porch studio study terrace veranda washroom workshop"""
)
BUILDINGS = words(
    """airport bakery barn brewery cabin castle chapel church cinema clinic cottage factory hospital hostel hotel
    lighthouse mill monastery museum palace pharmacy prison school shop stable stadium station temple theatre tower"""
)
LANDSCAPES = words(
    """bay beach canyon cape cave cliff desert dune estuary fen field fjord forest glacier gorge heath hill island
    jungle lagoon lake marsh meadow moor mountain plain pond prairie reef river shore steppe swamp valley volcano"""
)

VEHICLES = words(
    """ambulance barge bicycle boat bus canoe caravan carriage cart coach convertible dinghy ferry forklift
    frigate gondola hatchback helicopter jeep kayak lorry minibus moped motorbike raft rickshaw rowboat schooner
    scooter sledge steamer submarine taxi tractor train tram tricycle truck trolley van wagon wheelbarrow yacht
    zeppelin"""
)
CITIES = words(
    """Accra Amman Ankara Athens Baghdad Bangkok Berlin Bern Bogota Brussels Bucharest Budapest Cairo Canberra
    Caracas Dakar Delhi Dublin Hanoi Harare Havana Helsinki Jakarta Kabul Lagos Lima Lisbon London Luanda Lusaka
    Madrid Manila Minsk Nairobi Nicosia Oslo Ottawa Paris Prague Quito Riga Rome Santiago Seoul Stockholm
    Tallinn Tehran Tokyo Tripoli Tunis Vienna Vilnius Warsaw Yerevan Zagreb"""
)


def pick(items: Sequence[str], u: float) -> str:
    """The item at u in [0, 1)."""
    return items[int(u * len(items))]
