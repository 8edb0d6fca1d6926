"""The configuration: typed sections, checks across keys, and reading YAML with overrides."""

from fedclip.config.attack import AttackConfig
from fedclip.config.data import DataConfig, PartitionConfig, TaskConfig
from fedclip.config.deploy import DeployConfig
from fedclip.config.federation import (
    DynamicRankConfig,
    FederationConfig,
    ServerOptimizerConfig,
    SharingConfig,
)
from fedclip.config.loading import load_config
from fedclip.config.model import LoraConfig, ModelConfig, TargetModules
from fedclip.config.privacy import PrivacyConfig
from fedclip.config.robust import RobustConfig
from fedclip.config.secure import SecureConfig
from fedclip.config.training import ClientConfig, EngineConfig, EvaluationConfig, OptimizerConfig
from fedclip.config.tree import Config

__all__ = [
    "AttackConfig",
    "ClientConfig",
    "Config",
    "DataConfig",
    "DeployConfig",
    "DynamicRankConfig",
    "EngineConfig",
    "EvaluationConfig",
    "FederationConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "RobustConfig",
    "SecureConfig",
    "ServerOptimizerConfig",
    "SharingConfig",
    "TargetModules",
    "TaskConfig",
    "load_config",
]
