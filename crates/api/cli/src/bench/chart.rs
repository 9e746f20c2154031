//! Charts of medians as SVG.

use anyhow::anyhow;
use plotters::coord::ranged1d::ValueFormatter;
use plotters::prelude::*;

use crate::output::figure;

/// Lines over the number of tokens.
pub(super) struct Chart {
    pub title: String,
    pub x: String,
    pub y: String,
    /// Whether the vertical axis is logarithmic.
    pub log: bool,
    pub series: Vec<Series>,
}

pub(super) struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

const SIZE: (u32, u32) = (900, 560);
/// Told apart by people who see no red or green as well (Okabe and Ito 2008).
const COLOURS: [RGBColor; 4] =
    [RGBColor(0, 114, 178), RGBColor(213, 94, 0), RGBColor(0, 158, 115), RGBColor(90, 90, 90)];

impl Chart {
    /// The drawing; `under` goes below the title.
    pub(super) fn to_svg(&self, under: &str) -> anyhow::Result<String> {
        let mut text = String::new();
        self.draw(&mut text, under)
            .map_err(|error| anyhow!("the chart cannot be drawn: {error}"))?;
        Ok(text)
    }

    fn draw(&self, text: &mut String, under: &str) -> Result<(), Box<dyn std::error::Error>> {
        let points = self.series.iter().flat_map(|s| &s.points);
        let xs = || points.clone().map(|p| p.0);
        let ys = || points.clone().map(|p| p.1);
        let last = xs().fold(1.0, f64::max);
        let (low, high) = (ys().fold(f64::INFINITY, f64::min), ys().fold(1e-3, f64::max));
        let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let root = root.titled(&self.title, ("sans-serif", 26).into_font())?;
        let root =
            root.titled(under, ("sans-serif", 15).into_font().color(&RGBColor(80, 80, 80)))?;
        let mut builder = ChartBuilder::on(&root);
        builder.margin(16).x_label_area_size(52).y_label_area_size(76);
        let x = 0.0..last * 1.04;
        if self.log {
            let decades =
                10_f64.powf(low.max(1e-4).log10().floor())..10_f64.powf(high.log10().ceil());
            self.lines(&mut builder.build_cartesian_2d(x, decades.log_scale())?)?;
        } else {
            self.lines(&mut builder.build_cartesian_2d(x, 0.0..high * 1.15)?)?;
        }
        root.present()?;
        Ok(())
    }

    fn lines<'a, Y>(
        &self,
        chart: &mut ChartContext<
            'a,
            SVGBackend<'a>,
            Cartesian2d<plotters::coord::types::RangedCoordf64, Y>,
        >,
    ) -> Result<(), Box<dyn std::error::Error>>
    where
        Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        chart
            .configure_mesh()
            .x_desc(&self.x)
            .y_desc(&self.y)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|&y| trimmed(y))
            .label_style(("sans-serif", 15))
            .axis_desc_style(("sans-serif", 17))
            .light_line_style(RGBColor(240, 240, 240))
            .bold_line_style(RGBColor(215, 215, 215))
            .draw()?;
        for (series, colour) in self.series.iter().zip(COLOURS.iter().cycle()) {
            let line = LineSeries::new(series.points.iter().copied(), colour.stroke_width(2));
            let sample = *colour;
            chart.draw_series(line)?.label(&series.name).legend(move |(x, y)| {
                PathElement::new([(x, y), (x + 22, y)], sample.stroke_width(3))
            });
            let dots = series.points.iter().map(|&p| Circle::new(p, 4, colour.filled()));
            chart.draw_series(dots)?;
            let label = |&(x, y): &(f64, f64)| {
                EmptyElement::at((x, y)) + Text::new(figure(y), (-14, -20), ("sans-serif", 13))
            };
            chart.draw_series(series.points.iter().map(label))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.9))
            .border_style(RGBColor(200, 200, 200))
            .label_font(("sans-serif", 15))
            .draw()?;
        Ok(())
    }
}

/// A label of the axis, without noise.
fn trimmed(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_names_its_axes_and_series() {
        let series = |name: &str, y| Series {
            name: name.to_owned(),
            points: vec![(512.0, y), (1024.0, 2.0 * y)],
        };
        let mut chart = Chart {
            title: "Time".to_owned(),
            x: "tokens".to_owned(),
            y: "ms".to_owned(),
            log: true,
            series: vec![series("cold", 900.0), series("restored", 0.7)],
        };
        for log in [true, false] {
            chart.log = log;
            let svg = chart.to_svg("a machine").expect("a chart");
            for text in ["Time", "tokens", "ms", "cold", "restored", "a machine", "900"] {
                assert!(svg.contains(text), "no '{text}' in the chart");
            }
        }
    }
}
