"""Speech without recordings: texts from grammars (`corpus`, `grammars`), spoken by espeak-ng
(`synthesis`).
"""
