from offsite.emulator.modality import collate
from offsite.emulator.modality.causal_text.encoding import IGNORED, Tokens


def test_a_batch_is_padded_to_its_longest_and_counts_what_is_predicted() -> None:
    batch = collate([Tokens((5, 6, 7), (5, 6, 7)), Tokens((8,) * 5, (IGNORED,) * 3 + (8, 8))])
    assert batch.input_ids.tolist() == [[5, 6, 7, 0, 0], [8] * 5]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch.labels.tolist() == [[5, 6, 7, IGNORED, IGNORED], [IGNORED] * 3 + [8, 8]]
    assert batch.targets == 2 + 2  # a first token is never predicted
