"""How the small Whisper that ships with the project was trained.

`python -m lora_speech.pretraining` trains it again.
"""
