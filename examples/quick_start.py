"""From real text to a new adapter: collect, train, generate. Needs no network once `make demo` has set things up."""

from lora_factory import CollectArguments, collect_adapters, train_generator
from lora_factory.demo.corpus import build_corpus

tasks, unseen = build_corpus("quick-start/tasks", seen=3)  # or load_tasks("tasks.yaml")
settings = CollectArguments(steps=12, snapshots=4, batch_size=4, sequence_length=64, target_modules="q_proj,v_proj")
zoo = collect_adapters(tasks, "HuggingFaceTB/SmolLM2-135M-Instruct", "quick-start/zoo", settings)
generator = train_generator(zoo, "quick-start/generator", overwrite=True)

model = generator.generate_adapter("Typed stubs of Python functions and classes")  # a peft.PeftModel
generator.save_adapter("Typed stubs of Python functions and classes", "quick-start/adapter", overwrite=True)
print(model.active_adapters, model.peft_config["default"].base_model_name_or_path)
