"""What the paper does not have. Importing this adds its methods and its look-ahead to the paper's.
"""
import sys

import support

if sys.argv[:1] == ["-m"] and "beyond.own_texts" in sys.orig_argv:  # It runs after this file.
    support.ctrl_c_leaves("__main__")
from beyond.draft_model import DRAFT_MODEL
from beyond.fused import FUSED
from beyond.lookahead import LookaheadPlus
from beyond.tree import TREE
from pass_sampler import LOOKAHEADS, METHODS

METHODS |= {"fused": FUSED, "tree": TREE, "draft-model": DRAFT_MODEL}
LOOKAHEADS.append(LookaheadPlus)
