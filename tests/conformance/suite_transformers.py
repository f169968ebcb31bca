# SPDX-License-Identifier: Apache-2.0
"""transformers' generic suite for causal language models, on a tiny JAI and, to compare, on a tiny Mixtral.

`run.py` copies this file into `tests/models/jai/` of transformers' test folder, where a model of its own would have it.
"""

import unittest

from transformers import MixtralModel
from transformers.models.auto import modeling_auto

from jai import (
    JaiConfig,
    JaiForCausalLM,
    JaiForQuestionAnswering,
    JaiForSequenceClassification,
    JaiForTokenClassification,
    JaiModel,
)

from ... import test_expert_parallel_mixin, test_fsdp_mixin, test_tensor_parallel_mixin
from ...causal_lm_tester import CausalLMModelTest, CausalLMModelTester

# The suite asks these tables what each class is for, and skips labels and losses of a class that they do not name.
modeling_auto.MODEL_MAPPING_NAMES["jai"] = "JaiModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["jai"] = "JaiForCausalLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["jai"] = "JaiForSequenceClassification"
modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["jai"] = "JaiForTokenClassification"
modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES["jai"] = "JaiForQuestionAnswering"

# The parallel tests run for a few model types only, which stand for all.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES |= {"jai", "mixtral"}
test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES |= {"jai", "mixtral"}
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES |= {"jai", "mixtral"}


class GenericSuite(CausalLMModelTest, test_expert_parallel_mixin.ExpertParallelTesterMixin):
    def is_pipeline_test_to_skip(self, *args, **kwargs) -> bool:
        return True  # they load tokenizers and processors by model type from the Hub; Mixtral's own tests do the same


class JaiModelTester(CausalLMModelTester):
    base_model_class = JaiModel
    config_class = JaiConfig
    causal_lm_class = JaiForCausalLM
    sequence_classification_class = JaiForSequenceClassification
    token_classification_class = JaiForTokenClassification
    question_answering_class = JaiForQuestionAnswering

    def __init__(self, parent: unittest.TestCase):
        # Two layers, of which the second runs the first one's block again: a skip is live in every test.
        super().__init__(parent, block_size=1, block_repeats=[2], skip_alpha=0.3)


class JaiModelTest(GenericSuite, unittest.TestCase):
    model_tester_class = JaiModelTester


class MixtralModelTester(CausalLMModelTester):
    base_model_class = MixtralModel


class MixtralModelTest(GenericSuite, unittest.TestCase):
    model_tester_class = MixtralModelTester
