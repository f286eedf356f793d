fn row_bias(span: Span, row: u32) -> f32 {
    return 0.0;
}
