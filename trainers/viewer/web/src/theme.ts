import { createTheme, type MantineColorsTuple } from "@mantine/core";

const bolt: MantineColorsTuple = [
  "#fff8e1",
  "#ffefcc",
  "#ffdd9b",
  "#ffca64",
  "#ffba38",
  "#ffb01b",
  "#f59f00",
  "#e38f00",
  "#ca7e00",
  "#af6c00",
];

export const theme = createTheme({
  primaryColor: "bolt",
  primaryShade: { light: 8, dark: 5 },
  colors: { bolt },
  defaultRadius: "sm",
  autoContrast: true,
  fontFamily: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
  fontFamilyMonospace: "ui-monospace, 'Cascadia Mono', 'DejaVu Sans Mono', Menlo, Consolas, monospace",
});
