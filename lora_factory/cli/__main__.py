"""``python -m lora_factory.cli``, which ``accelerate launch`` needs."""

import sys

from lora_factory.cli.commands import main

sys.exit(main())
