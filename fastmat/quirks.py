"""Every place where published code departs from what its paper says, as one named field each.

| field | correct (default) | published (`parity="official"`) | where |
|---|---|---|---|
| `candidate_row_offset` | 1: row 0 of the masked language model's output is [CLS] | 0: a word gets its left neighbour's candidates | Co-Attack, SGA and descendants |
| `append_sep` | True: `[CLS] pieces [SEP]` | False: the bundled tokenizer drops [SEP] | ALBEF, SGA, Co-Attack |
| `text_max_length` | None: the model's own context | 77 (CLIP source), 30 (BERT source) | SGA; Co-Attack 30 |
| `mid_max_length` | None: the model's own context | 30: the misspelt `max_lemgth` is swallowed | SGA, re-encoding between text and image attack |
| `round_trip` | False: the victim reads the caption | True: caption -> BERT pieces -> string -> CLIP BPE | SGA and Co-Attack with CLIP victims |
| `blanks_in_candidates` | False: one word replaces one word; special tokens such as [UNK] are no words | True: a several-piece word may become several words, and [UNK] is a candidate | BERT-Attack and descendants |
| `case_sensitive_filters` | False | True: "The" is no stop word, "Dog" -> "dog" counts as a change | BERT-Attack and descendants |
| `antialias` | True | False: tensor resize of torchvision 0.15 | SGA's scale views |
| `one_sided_start` | False: start uniform in [-eps, eps] | True: uniform in [0, eps] | Co-Attack, Sep-Attack |
| `clamp_start` | True: the start lies in the pixel box | False | RobustVLM's PGD, Co-Attack, Sep-Attack |
| `last_caption_only` | False: one image against all its captions | True: one image per pair, of which the last caption's is kept | Co-Attack |
| `raw_images` | False: whoever looks at an image, it is normalised first | True: the text search of the fusion forms sees raw pixels | Co-Attack, Sep-Attack on fusion models |
| `zero_history` | False: the first checkpoint compares with the loss of the start | True: with 0, the last row of a buffer still empty | AutoAttack's and RobustVLM's APGD |
| `pairs_only` | False: every caption of an image's group is its positive | True: its own alone, so images of one class repel each other's prompts | MMCoA |
| `summed_kl` | False: KL terms are means over images, as the cross-entropy beside them | True: sums, which grow with the batch | PMG-AFT |
| `cosine_logits` | False: logits are logit_scale * cosine | True: texts are normalised once more, after the scale, which is lost | PMG-AFT |
| `frozen_siamese` | False: clean and adversarial images pass through one network, with stop-gradient on either side | True: the clean side is the frozen original, so that half of the loss is constant | Sim-CLIP |
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Quirks:
    """Defaults are the correct behaviour; `Quirks.official()` is the published one."""

    candidate_row_offset: int = 1
    append_sep: bool = True
    text_max_length: int | None = None
    mid_max_length: int | None = None
    round_trip: bool = False
    blanks_in_candidates: bool = False
    case_sensitive_filters: bool = False
    antialias: bool = True
    one_sided_start: bool = False
    clamp_start: bool = True
    last_caption_only: bool = False
    raw_images: bool = False
    zero_history: bool = False
    pairs_only: bool = False
    summed_kl: bool = False
    cosine_logits: bool = False
    frozen_siamese: bool = False

    @classmethod
    def official(cls, *, round_trip: bool = True, text_max_length: int = 77) -> Quirks:
        """The published behaviour; `round_trip` and 77 are for CLIP victims, False and 30 for BERT-tokenised ones."""
        return cls(
            candidate_row_offset=0,
            append_sep=False,
            text_max_length=text_max_length,
            mid_max_length=30,
            round_trip=round_trip,
            blanks_in_candidates=True,
            case_sensitive_filters=True,
            antialias=False,
            one_sided_start=True,
            clamp_start=False,
            last_caption_only=True,
            raw_images=True,
            zero_history=True,
            pairs_only=True,
            summed_kl=True,
            cosine_logits=True,
            frozen_siamese=True,
        )

    def but(self, **changes: bool | int | None) -> Quirks:
        """The same with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]
