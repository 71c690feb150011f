import { Alert, Button, Code } from "@mantine/core";
import { Component, type ReactNode } from "react";

/** When a view breaks, the rest of the page stays, and what broke is said. */
export class Boundary extends Component<{ children: ReactNode }, { error: Error | null }> {
  override state = { error: null };

  static getDerivedStateFromError(error: Error) {
    return { error };
  }

  override render() {
    const error: Error | null = this.state.error;
    if (error === null) return this.props.children;
    return (
      <Alert color="red" title="This view broke: a fault of the viewer's" role="alert">
        <Code block>{String((error as Error).stack ?? error)}</Code>
        <Button mt="sm" size="compact-sm" onClick={() => this.setState({ error: null })}>
          Try again
        </Button>
      </Alert>
    );
  }
}
