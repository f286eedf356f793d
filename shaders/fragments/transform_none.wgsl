fn transform_logit(logit: f32) -> f32 {
    return logit;
}
