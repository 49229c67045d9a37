"""Equal threads for every contestant."""

import pytest
import torch

import urlfast
from urlfast import _core


@pytest.fixture
def set_threads():
    before = torch.get_num_threads(), _core.num_threads()

    def both(n):
        torch.set_num_threads(n)
        urlfast.set_num_threads(n)

    yield both
    torch.set_num_threads(before[0])
    urlfast.set_num_threads(before[1])


@pytest.fixture
def one_thread(set_threads):
    set_threads(1)
