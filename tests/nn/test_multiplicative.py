"""The multiplicative RNN against its equation, and its rows against themselves alone."""

from __future__ import annotations

import pytest
import torch
from rnn_cases import (
    check_rows_alone,
    nearly,
    symbols_or_dense,
)

from gfrnn.nn import MultiplicativeRNN


def test_multiplicative_equals_its_equation():
    torch.manual_seed(0)
    rnn = MultiplicativeRNN(3, 4, dtype=torch.float64)
    symbols = torch.tensor([[0, 2], [1, 1], [2, 0]])
    y, last = rnn(symbols)
    w_hx, w_mx = rnn.weight_ih.chunk(2)
    h = torch.zeros(4, dtype=torch.float64)
    for t in range(3):
        m = w_mx[:, symbols[t, 1]] * (rnn.weight_mh @ h)
        h = torch.tanh(w_hx[:, symbols[t, 1]] + rnn.weight_hm @ m + rnn.bias)
        torch.testing.assert_close(y[t, 1], h)
    torch.testing.assert_close(last[0, 1], h)
    _, middle = rnn(symbols[:1])
    torch.testing.assert_close(rnn(symbols[1:], middle)[0], y[1:])


@pytest.mark.parametrize("symbols", [False, True])
def test_a_row_of_the_multiplicative_is_as_it_is_alone(symbols):
    torch.manual_seed(0)
    rnn = MultiplicativeRNN(5, 4, input_dropout=0.2, weight_dropout=0.2, dtype=torch.float64)
    x = symbols_or_dense(symbols, 5, 5)
    check_rows_alone(rnn, x, torch.randn(1, 5, 4, dtype=torch.float64), nearly(1e-10))
