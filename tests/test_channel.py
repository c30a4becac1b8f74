"""Messages between processes: whole, in order, and no more of them than the other end needs when it has not read for long."""

import os
import socket

import pytest

from app.channel import Channel, Closed


@pytest.fixture
def ends():
    pair = [Channel(end) for end in socket.socketpair()]
    yield pair
    for end in pair:
        end.close()


def drained(sender, receiver):
    messages = receiver.receive()
    while sender.has_unsent:
        sender.flush()
        messages += receiver.receive()
    return messages


def test_messages_arrive_whole_and_in_order_with_their_files(ends):
    sender, receiver = ends
    reading, writing = os.pipe()
    sender.send("a", text="ü" * 1000)
    sender.send("b", file=reading)
    sender.send("c")

    messages = drained(sender, receiver)

    assert [message["kind"] for message in messages] == ["a", "b", "c"]
    assert messages[0]["text"] == "ü" * 1000
    os.write(writing, b"x")
    assert os.read(messages[1]["file"], 1) == b"x"
    for file in (reading, writing, messages[1]["file"]):
        os.close(file)


def test_an_end_that_reads_nothing_is_left_the_latest_state_and_every_other_message(ends):
    sender, receiver = ends
    for number in range(1000):
        sender.send("view", latest=True, number=number, padding="x" * 10_000)
        if number % 100 == 0:
            sender.send("looked", number=number)
    assert len(sender._unsent) < 20

    messages = drained(sender, receiver)

    views = [message["number"] for message in messages if message["kind"] == "view"]
    assert views == sorted(views)
    assert views[-1] == 999
    assert [message["number"] for message in messages if message["kind"] == "looked"] == list(range(0, 1000, 100))


def test_the_end_of_the_other_process_is_told_behind_what_it_sent(ends):
    sender, receiver = ends
    sender.send("last words")
    sender.close()

    assert [message["kind"] for message in receiver.receive()] == ["last words"]
    with pytest.raises(Closed):
        receiver.receive()
