fn transform_logit(logit: f32) -> f32 {
    return LOGIT_CAP * accurate_tanh(logit / LOGIT_CAP);
}
