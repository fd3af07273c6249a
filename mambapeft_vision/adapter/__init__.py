"""A backbone with methods attached, its files, the presets, and how presets scale to other backbones."""
