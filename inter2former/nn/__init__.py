"""The network: one file a box of the paper's Figure 2. No images, no prompts, no speed tricks that hide the maths."""
