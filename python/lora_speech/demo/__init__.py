"""`lora-speech demo`: the whole story (`run`), its speed (`speed`), on a terminal (`terminal`) and
as a page (`report`).
"""
