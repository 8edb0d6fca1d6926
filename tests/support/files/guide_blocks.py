from models.clip import create_clip_model

# 从配置文件创建模型
config = {
    'model_name': 'openai/clip-vit-base-patch32',
    'num_classes': 10,
    'lora': {
        'enabled': True,
        'r': 8,
        'lora_alpha': 16,
        'lora_dropout': 0.05,
        'target_modules': {
            'vision_encoder': ['q_proj', 'v_proj', 'k_proj', 'out_proj']
        }
    }
}

model = create_clip_model(config)

# 检查LoRA是否启用
print(f"LoRA enabled: {model.is_lora_enabled()}")

# 获取LoRA信息
lora_info = model.get_lora_info()
print(f"LoRA trainable parameters: {lora_info['trainable_parameters']}")

# 获取模型摘要
summary = model.get_model_summary()
print(f"Total parameters: {summary['total_parameters']:,}")
print(f"Trainable parameters: {summary['trainable_parameters']:,}")

# 获取LoRA参数（用于联邦学习聚合）
lora_params = model.get_parameters()

# 设置LoRA参数（用于模型更新）
model.set_parameters(aggregated_params)

# 检查LoRA参数
def debug_lora_params(model):
    if model.is_lora_enabled():
        lora_params = model.get_parameters()
        print(f"LoRA parameter count: {len(lora_params)}")
        for name in list(lora_params.keys())[:5]:  # 显示前5个参数
            print(f"  {name}: {lora_params[name].shape}")
    else:
        print("LoRA not enabled")

debug_lora_params(model)
