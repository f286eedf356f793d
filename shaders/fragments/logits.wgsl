// A logit, rounded if the precision says so, then transformed.
fn logit_at(index: u32) -> f32 {
    if ROUND_LOGITS {
        return transform_logit(round_model(logits[index]));
    }
    return transform_logit(logits[index]);
}
