"""The checker of types and shapes at run time; an int passes for a float, as in type checkers."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
