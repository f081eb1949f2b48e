"""What goes in: recordings (`audio`), lists of utterances (`manifest`), features, windows of long
recordings, and texts as they are compared.
"""
