"""Published figures that a run's scores are printed beside, with their sources."""

PRONUNCIATION = (
    # Name, phoneme error rate %, word error rate %. CMUdict without stress; splits differ.
    ("joint n-gram (Bisani & Ney, 2008)", 5.88, 24.53),
    ("LSTM encoder-decoder, 2 layers (Yao & Zweig, 2015)", 7.63, 28.61),
    ("bi-LSTM with alignment, 3 layers (Yao & Zweig, 2015)", 5.45, 23.55),
    ("attention (Toshniwal & Livescu, 2016)", 5.04, 21.69),
    ("Transformer 4 + 4 layers (Yolchuyeva et al., 2019)", 5.23, 22.1),
    ("g2p-en 2.1, a GRU of 0.84 M parameters, greedy", 7.49, 25.87),
)
