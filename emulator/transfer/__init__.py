"""Moving an adapter to a new base without the data it was trained on, as in Trans-LoRA (Wang et al., arXiv 2405.17258).

The new base writes texts like a few public ones; of these the old base with its adapter answers those that it was tuned
for; and an adapter of the new base learns these answers.
"""
