"""Caption pre-processing of the published retrieval code.

| name | what it does | source |
|---|---|---|
| `none` | nothing: CLIP's tokenizer does its own cleaning | |
| `albef` | lower case; `, . ' ! ? " ( ) * # : ; ~` removed; `-` and `/` to blanks; `<person>` to `person`; 30 words | ALBEF, `dataset/utils.py` |
| `blip` | lower case; `. ! " ( ) * # : ; ~` to blanks (`, ' - ? /` stay); 30 words | BLIP, retrieval data sets |

Both also turn a run of white space into one blank and strip the ends.
"""  # noqa: E501

from __future__ import annotations

import re
from typing import Literal, get_args

from fastmat.errors import UserError, nearest

CaptionRule = Literal["none", "albef", "blip"]
MAX_WORDS = 30

_ALBEF_REMOVED = re.compile(r"""[,.'!?"()*#:;~]""")
_BLIP_BLANKED = re.compile(r"""[.!"()*#:;~]""")


def preprocess(caption: str, rule: CaptionRule) -> str:
    """`caption` as `rule` would have it.

    >>> preprocess("A T-shirt, isn't it? (red)", "albef"), preprocess("A T-shirt, isn't it? (red)", "blip")
    ('a t shirt isnt it red', "a t-shirt, isn't it? red")
    """
    if rule == "none":
        return caption
    if rule == "albef":
        text = _ALBEF_REMOVED.sub("", caption.lower()).replace("-", " ").replace("/", " ")
        text = text.replace("<person>", "person")
    elif rule == "blip":
        text = _BLIP_BLANKED.sub(" ", caption.lower())
    else:
        raise UserError(f"caption pre-processing {rule!r} is unknown{nearest(str(rule), get_args(CaptionRule))}")
    return " ".join(text.split()[:MAX_WORDS])
