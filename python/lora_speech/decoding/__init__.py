"""Whisper on the fused operators, and the searches over it.

`whisper_encoder` and `whisper_decoder` are the model as a flat loop over `projections`, or recorded
whole under INT8 (`recorded_encoder`, `decoder_step`, on `recorded_parts` and `linear_parts`).
`stepping` and `graphed_steps` take a decoder's steps; `greedy` and `beam` (over `beam_search`)
choose tokens, within the rules of `prompts`. `adapter_rows` says which adapter a row uses.
"""
