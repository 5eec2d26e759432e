"""The definition of attention in plain torch.

Others import attention (the three passes) and philox (which pairs dropout keeps); blocks and scores
are what the passes are made of.
"""
