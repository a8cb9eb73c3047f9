"""The Markdown templates of the model cards, read as package data of ``lora_factory.model_card_templates``."""
