"""The decisions, as small pure functions: what to spend, where it is hard, what each part deserves, how to run it;
and the training loop that all share.

Import from the rooms themselves (`from foveate.engine.budget import Budget`); this file imports nothing, so that
reading a budget on the command line never loads torch.
"""
