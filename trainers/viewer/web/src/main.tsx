import "@mantine/core/styles.css";
import "uplot/dist/uPlot.min.css";
import "./style.css";
import { MantineProvider } from "@mantine/core";
import { QueryClient, QueryClientProvider } from "@tanstack/react-query";
import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { App } from "./app";
import { SourceError } from "./source";
import { theme } from "./theme";

const queries = new QueryClient({
  defaultOptions: {
    queries: {
      staleTime: 30_000,
      gcTime: 60_000, // answers about large episodes are large
      refetchOnWindowFocus: true,
      networkMode: "always", // the server is most often on this machine: no network is needed
      retry: (count, error) =>
        count < 2 && !(error instanceof SourceError && error.status >= 400 && error.status < 500),
    },
  },
});
const nonce = () => document.querySelector<HTMLMetaElement>('meta[name="csp-nonce"]')?.content || "";

createRoot(document.getElementById("root") as HTMLElement).render(
  <StrictMode>
    <MantineProvider theme={theme} defaultColorScheme="auto" getStyleNonce={nonce}>
      <QueryClientProvider client={queries}>
        <App />
      </QueryClientProvider>
    </MantineProvider>
  </StrictMode>,
);
