fn weight_scale(span: Span, row: u32, col: u32) -> f32 {
    return 1.0;
}
