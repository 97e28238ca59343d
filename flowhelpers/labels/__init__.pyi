from .describe import (
    describe_features as describe_features,
    logit_lens as logit_lens,
    read_labels as read_labels,
    subject_scores as subject_scores,
    top_contexts as top_contexts,
    top_logit_tokens as top_logit_tokens,
    top_tokens as top_tokens,
)
from .neuronpedia import (
    cosine_check as cosine_check,
    feature_page as feature_page,
    neuronpedia_labels as neuronpedia_labels,
)
from .plots import token_text as token_text
