"""What the papers print, to stand beside what was measured here.

Scores are unclipped returns of Atari games after 100,000 interactions. Printed aggregates are in percent of a human's, as printed; those
of the per-game scores with today's reference scores differ from them (stats.py recomputes: APT's mean is 66.6, not the 69.6 printed).
"""

APT, APS = "Liu, Abbeel, Behavior From the Void (2021)", "Liu, Abbeel, APS (2021)"

SCORES: dict[str, tuple[str, dict[str, float]]] = {  # of the fine-tuned agent, by the method that it was pre-trained with
    "apt": (
        f"{APT}, Table 2",
        dict(
            alien=2614.8, amidar=211.5, assault=891.5, asterix=185.5, bank_heist=416.7, battle_zone=7065.1, boxing=21.3, breakout=10.9,
            chopper_command=317.0, crazy_climber=44128.0, demon_attack=5071.8, freeway=29.9, frostbite=1796.1, gopher=2590.4, hero=6789.1,
            jamesbond=356.1, kangaroo=412.0, krull=2312.0, kung_fu_master=17357.0, ms_pacman=2827.1, pong=-8.0, private_eye=96.1,
            qbert=17671.2, road_runner=4782.1, seaquest=2116.7, up_n_down=8289.4,
        ),
    ),
    "aps": (
        f"{APS}, Atari table",
        dict(
            alien=934.9, amidar=178.4, assault=413.3, asterix=1159.7, bank_heist=262.7, battle_zone=26920.1, boxing=36.3, breakout=19.1,
            chopper_command=2517.0, crazy_climber=67328.1, demon_attack=7989.0, freeway=27.1, frostbite=496.5, gopher=2386.5, hero=12189.3,
            jamesbond=622.3, kangaroo=5280.1, krull=4496.0, kung_fu_master=22412.0, ms_pacman=2092.3, pong=12.5, private_eye=117.9,
            qbert=19271.4, road_runner=5919.0, seaquest=4209.7, up_n_down=4911.9,
        ),
    ),
    "apt, random head": (f"{APT}, Table 5", dict(alien=1755.0, freeway=15.2, qbert=2138.3, private_eye=61.3, ms_pacman=1724.9)),
}  # fmt: skip

AGGREGATES: dict[str, tuple[str, float, float]] = {  # row: source; median and mean over the 26 games, percent, as printed
    "APT": (f"{APT}, Table 3", 47.50, 69.55),
    "APS": (f"{APS}, Atari table", 58.80, 99.04),
    "random neighbour": (f"{APT}, Table 4", 20.80, 24.97),
    "fixed encoder": (f"{APT}, Table 4", 33.24, 41.08),
    "without contrastive learning": (f"{APT}, Table 3", 21.23, 28.12),
    "without optimisation change": (f"{APT}, Table 4", 41.50, 60.10),
    "without architecture change": (f"{APT}, Table 4", 45.71, 67.82),
    "DrQ": (f"{APS}, Atari table", 26.8, 35.7),
}
