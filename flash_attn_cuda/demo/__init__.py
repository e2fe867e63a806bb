# SPDX-License-Identifier: BSD-3-Clause
"""What `python -m flash_attn_cuda` shows, one module each: which kernels run here (report), how
exact they are (check), what they cost beside standard attention (comparison), and that a model
learns with them (train, on the model of gpt)."""
