"""How a checkpoint becomes another: open, plan, stream, commit. Encoding lives in qkernels."""
