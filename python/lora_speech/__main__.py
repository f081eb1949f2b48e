"""`python -m lora_speech` is `lora-speech`."""

from lora_speech.cli import main

if __name__ == "__main__":  # not in the processes that `bench` spawns
    main()
