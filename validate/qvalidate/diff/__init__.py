"""What is different between two checkpoints, in meaning: `qdiff A B`.

Built on what the validator reads of one checkpoint; nothing here judges which of the two is right.
"""
