"""What Flower starts at a site for each message."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedclip.deploy.flower.record import bytes_of, record_of
from fedclip.deploy.site.handover import hand_over
from fedclip.device import keep_freed_memory

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Hand the request to the site's trainer, and its answer back."""
    keep_freed_memory()
    return Message(record_of(hand_over(bytes_of(message.content))), reply_to=message)
