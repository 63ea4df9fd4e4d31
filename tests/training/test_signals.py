import os
import signal

import pytest

from ov3fast.training.signals import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_the_handler_only_sets_a_flag(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.name is None
        os.kill(os.getpid(), number)
        assert stop.name == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_a_second_interrupt_stops_at_once():
    with StopRequest(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
