"""Settings of the training script that cannot work, each a change to the good command."""

EMBEDDED = {"--pretrained_model_name_or_path": None, "--instance_data_dir": None, "--instance_prompt": None}

REFUSED = {
    # Which blocks
    "skip_blocks word": ({"--skip_blocks": "half"}, ["--skip_blocks is 'half'", "none, auto"]),
    "skip_blocks percent": ({"--skip_blocks": "30%"}, ["--skip_blocks", "30%"]),
    "skip_blocks triple": ({"--skip_blocks": "1,2,3"}, ["--skip_blocks", "1,2,3"]),
    "skip_blocks negative pair": ({"--skip_blocks": "2,-1"}, ["--skip_blocks", "2,-1"]),
    "skip_blocks empty": ({"--skip_blocks": ""}, ["--skip_blocks"]),
    "skip_blocks fraction": ({"--skip_blocks": "0.5"}, ["--skip_blocks", "0.5"]),
    "no block left by a number": ({"--skip_blocks": "5"}, ["--skip_blocks 5", "at most 4"]),
    "no block left by a pair": ({"--skip_blocks": "2,3"}, ["--skip_blocks 2,3", "at most 4"]),
    "no block left of the embedded model": ({**EMBEDDED, "--skip_blocks": "99"}, ["--skip_blocks 99", "at most"]),
    "skip_ratio": ({"--skip_blocks": "auto", "--skip_ratio": "1"}, ["--skip_ratio is 1"]),
    "residuals word": ({"--residuals": "sometimes"}, ["--residuals", "sometimes", "online"]),
    # Sizes
    "resolution off the grid": ({"--resolution": "60"}, ["--resolution is 60", "8 px", "64"]),
    "resolution below the grid": ({"--resolution": "3"}, ["--resolution is 3", "use 8"]),
    "embedded resolution off the grid": ({**EMBEDDED, "--resolution": "60"}, ["--resolution is 60"]),
    "min_patch_size above the maximum": (
        {"--min_patch_size": "64", "--max_patch_size": "32"},
        ["--min_patch_size 64", "--max_patch_size 32"],
    ),
    "min_patch_size above the resolution": ({"--min_patch_size": "72"}, ["--min_patch_size 72", "--resolution"]),
    "min_patch_size off the grid": ({"--min_patch_size": "33"}, ["--min_patch_size is 33", "32"]),
    "max_patch_size off the grid": ({"--max_patch_size": "63"}, ["--max_patch_size is 63", "64"]),
    "patch_sampling word": ({"--patch_sampling": "big"}, ["--patch_sampling", "big", "dynamic"]),
    "buckets in another form": (
        {"--aspect_ratio_buckets": "64x96"},
        ["--aspect_ratio_buckets is '64x96'"],
    ),
    "buckets off the grid": ({"--aspect_ratio_buckets": "64,60"}, ["--aspect_ratio_buckets has 64,60", "8 px"]),
    "validation_resolution zero": ({"--validation_resolution": "0"}, ["--validation_resolution is 0", "1 or more"]),
    "validation_resolution off the grid": (
        {"--validation_resolution": "60", "--validation_prompt": "a photo of sks dog"},
        ["--validation_resolution is 60", "8 px", "64"],
    ),
    # Photos and prompts
    "no photos": ({"--instance_data_dir": None}, ["--instance_data_dir", "--dataset_name"]),
    "absent photos": ({"--instance_data_dir": "nowhere"}, ["--instance_data_dir nowhere", "does not exist"]),
    # What is seen in no time comes before a download.
    "absent photos of a model on the hub": (
        {"--instance_data_dir": "nowhere", "--pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev"},
        ["--instance_data_dir nowhere", "does not exist"],
    ),
    "absent condition images of a model on the hub": (
        {"--cond_data_dir": "nowhere", "--pretrained_model_name_or_path": "black-forest-labs/FLUX.1-Kontext-dev"},
        ["--cond_data_dir nowhere is not a folder"],
    ),
    "absent validation image of a model on the hub": (
        {
            "--cond_data_dir": "photos",
            "--validation_image": "nowhere.png",
            "--pretrained_model_name_or_path": "black-forest-labs/FLUX.1-Kontext-dev",
        },
        ["--validation_image nowhere.png is not a file"],
    ),
    "photos are a file": ({"--instance_data_dir": "a file"}, ["--instance_data_dir a file", "is a file"]),
    "no images": ({"--instance_data_dir": "no photos"}, ["--instance_data_dir no photos", "no images", "png"]),
    "unreadable images": (
        {"--instance_data_dir": "broken"},
        ["--instance_data_dir broken", "3 images", "empty.jpg", "page.png", "cut.png", "replace or remove"],
    ),
    "two sources of photos": ({"--dataset_name": "photos"}, ["--instance_data_dir", "--dataset_name"]),
    "absent dataset": (
        {"--instance_data_dir": None, "--dataset_name": "nowhere-at-all"},
        ["--dataset_name nowhere-at-all"],
    ),
    "no prompt": ({"--instance_prompt": None}, ["--instance_prompt"]),
    "empty prompt": ({"--instance_prompt": " "}, ["--instance_prompt"]),
    "class prompt missing": (
        {"--with_prior_preservation": True, "--class_data_dir": "classes"},
        ["--with_prior_preservation", "--class_prompt"],
    ),
    "class folder missing": (
        {"--with_prior_preservation": True, "--class_prompt": "a dog"},
        ["--with_prior_preservation", "--class_data_dir"],
    ),
    "class folder is a file": (
        {"--with_prior_preservation": True, "--class_prompt": "a dog", "--class_data_dir": "a file"},
        ["--class_data_dir a file"],
    ),
    # LoRA
    "unknown layers": (
        {"--lora_layers": "attn.to_q,attn.to_x"},
        ["--lora_layers 'attn.to_x' is the name of no linear layer"],
    ),
    "layers of no kept block": (
        {"--skip_blocks": "2,0", "--lora_layers": "attn.add_q_proj"},
        ["--lora_layers 'attn.add_q_proj' matches no layer of a kept", "single_transformer_blocks.0"],
    ),
    "layers that cannot learn": ({"--skip_blocks": "1,3", "--lora_layers": "attn.add_q_proj"}, ["--lora_layers"]),
    "a skipped block": ({"--lora_blocks": "1,4"}, ["--lora_blocks 4 is a skipped block", "1 to 3"]),
    "a block that is not there": ({"--lora_blocks": "5"}, ["--lora_blocks '5'", "0 to 4"]),
    "rank": ({"--rank": "0"}, ["--rank is 0", "1 or more"]),
    "lora_dropout": ({"--lora_dropout": "1"}, ["--lora_dropout is 1"]),
    # The model
    "model without an index": (
        {"--pretrained_model_name_or_path": "no index"},
        ["--pretrained_model_name_or_path no index", "model_index.json"],
    ),
    "damaged index": ({"--pretrained_model_name_or_path": "damaged index"}, ["--pretrained_model_name_or_path"]),
    "index that is a list": ({"--pretrained_model_name_or_path": "list index"}, ["--pretrained_model_name_or_path"]),
    "index without a class": ({"--pretrained_model_name_or_path": "no class"}, ["--pretrained_model_name_or_path"]),
    "unsupported pipeline": (
        {"--pretrained_model_name_or_path": "other pipeline"},
        ["--pretrained_model_name_or_path", "StableDiffusionPipeline", "FluxPipeline"],
    ),
    "model without a transformer": (
        {"--pretrained_model_name_or_path": "no transformer"},
        ["--pretrained_model_name_or_path", "transformer"],
    ),
    "model without a VAE": (
        {"--pretrained_model_name_or_path": "no vae"},
        ["--pretrained_model_name_or_path", "vae"],
    ),
    "transformer without a config": (
        {"--pretrained_model_name_or_path": "no transformer config"},
        ["--pretrained_model_name_or_path"],
    ),
    "damaged transformer config": (
        {"--pretrained_model_name_or_path": "damaged config"},
        ["--pretrained_model_name_or_path"],
    ),
    "unknown transformer class": (
        {"--pretrained_model_name_or_path": "unknown class"},
        ["--pretrained_model_name_or_path", "NoSuchTransformer2DModel"],
    ),
    "scheduler without a config": (
        {"--pretrained_model_name_or_path": "no scheduler config"},
        ["--pretrained_model_name_or_path"],
    ),
    "model without a text encoder": (
        {"--pretrained_model_name_or_path": "no text_encoder"},
        ["--pretrained_model_name_or_path", "text_encoder"],
    ),
    "model without a tokenizer": (
        {"--pretrained_model_name_or_path": "no tokenizer_2"},
        ["--pretrained_model_name_or_path", "tokenizer_2"],
    ),
    "transformer without weights": (
        {"--pretrained_model_name_or_path": "no weights"},
        ["--pretrained_model_name_or_path", "safetensors"],
    ),
    "VAE without weights": (
        {"--pretrained_model_name_or_path": "no vae weights"},
        ["--pretrained_model_name_or_path", "safetensors"],
    ),
    "variant that is not there": ({"--variant": "fp16"}, ["--variant", "fp16"]),
    "absent model": (
        {"--pretrained_model_name_or_path": "nobody/nothing-here"},
        ["--pretrained_model_name_or_path nobody/nothing-here"],
    ),
    # Training
    "lr_scheduler": ({"--lr_scheduler": "cosin"}, ["--lr_scheduler is 'cosin'", "cosine"]),
    "optimizer": ({"--optimizer": "SGD"}, ["--optimizer is 'SGD'", "AdamW"]),
    "learning_rate": ({"--learning_rate": "-1"}, ["--learning_rate is -1"]),
    "not a number": ({"--rank": "four"}, ["--rank", "four"]),
    "negative batch size": ({"--train_batch_size": "-2"}, ["--train_batch_size is -2", "1 or more"]),
    "negative steps": ({"--max_train_steps": "-1"}, ["--max_train_steps is -1"]),
    "zero steps": ({"--max_train_steps": "0"}, ["--max_train_steps is 0"]),
    "negative workers": ({"--dataloader_num_workers": "-1"}, ["--dataloader_num_workers is -1"]),
    "negative warmup": ({"--lr_warmup_steps": "-5"}, ["--lr_warmup_steps is -5"]),
    "negative seed": ({"--seed": "-1"}, ["--seed is -1"]),
    "negative repeats": ({"--repeats": "-1"}, ["--repeats is -1"]),
    "negative checkpoint limit": ({"--checkpoints_total_limit": "-1"}, ["--checkpoints_total_limit is -1"]),
    "precision": ({"--mixed_precision": "fp8"}, ["--mixed_precision", "fp8", "bf16"]),
    # Disk
    "residual_budget": ({"--residual_budget": "lots"}, ["--residual_budget", "lots", "8GB"]),
    "negative residual_budget": ({"--residual_budget": "-8GB"}, ["--residual_budget"]),
    "zero residual_budget": ({"--residual_budget": "0"}, ["--residual_budget"]),
    "stream_cache": ({"--stream_cache": "all"}, ["--stream_cache", "all", "8GB"]),
    "absent checkpoint": ({"--resume_from_checkpoint": "checkpoint-9"}, ["--resume_from_checkpoint checkpoint-9"]),
    "tracker": ({"--report_to": "excel"}, ["--report_to", "excel"]),
    "flag of another family": ({"--precondition_outputs": "0"}, ["--precondition_outputs", "sd3", "leave it out"]),
    "unknown flag": ({"--skip_block": "1,1"}, ["--skip_block", "did you mean --skip_blocks"]),
}
