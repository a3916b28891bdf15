"""Text that every export is checked on when the user gives none."""

from __future__ import annotations

# Several lengths, scripts and signs.
SENTENCES = (
    "A text encoder turns sentences into vectors.",
    "The weather is nice today, isn't it?",
    "def main(argv): return sum(int(a) for a in argv[1:])",
    "Prices rose by 3.5 % in 2024; wages didn't.",
    "Größe, naïve, ça va? Привет, мир!",
    "word",
    "Where can I buy a bicycle near the old railway station, and what would a good one with three gears cost?",
    "Bicycles are sold at the shop beside the station.",
)
