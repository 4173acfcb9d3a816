"""One base that answers with many adapters: those of a batch may differ, and are read when they are asked for.

For a first look at what runs have published. S-LoRA (Sheng et al., arXiv 2311.03285) does it for production, and vLLM.
"""
