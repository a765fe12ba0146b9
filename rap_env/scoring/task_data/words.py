"""Short common words for the recall task: keys are first names, values are things."""

_NAMES = """
Adam Alice Anna Ben Bob Carl Chris Clara Daniel David Diana Emma Eric Eva Frank Fred
George Grace Harry Helen Henry Jack James Jane John Julia Karen Kate Kevin Laura Linda
Louis Lucy Maria Mark Martin Mary Michael Nancy Nick Oliver Oscar Paul Peter Rachel
Robert Rose Ruth Sam Sarah Simon Sophie Steve Susan Thomas Tim Tom Victor Walter William
"""
_OBJECTS = """
apple arrow bag ball banana basket bell bird boat book bottle box bread brush bucket
camera candle card carpet cat chair clock coat cup desk dog door drum egg fish flag
flower fork glass guitar hammer hat horse key knife ladder lamp leaf letter map mirror
needle orange paper pen phone piano plate radio ring rope ruler shirt shoe spoon stone
sword table tent ticket train tree umbrella watch wheel window
"""

NAMES: tuple[str, ...] = tuple(_NAMES.split())
OBJECTS: tuple[str, ...] = tuple(_OBJECTS.split())
